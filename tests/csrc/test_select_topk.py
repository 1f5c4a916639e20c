"""The CUDA select kernel, run thread by thread on the CPU, equals the reference; every one of its barriers is needed."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vlmprune.ops import reference

ROOT = Path(__file__).parents[2]
H100_LIMIT, SMALL_LIMIT = 227 * 1024, 64 * 1024
SIZES = [1, 2, 31, 33, 640, 1023, 1024, 1025, 2944]
BARRIERS = 11  # one load, three a radix round, one emit


class Args(ctypes.Structure):
    """SelectTopkArgs of csrc/include/vlmprune/select_topk.cuh."""

    _fields_ = [(name, ctypes.c_void_p if kind == "p" else ctypes.c_int64) for name, kind in [
        ("scores", "p"), ("scores_stride", "i"), ("keep", "p"), ("keep_stride", "i"), ("keep_all", "i"),
        ("code", "p"), ("code_stride", "i"), ("index", "p"), ("count", "p"),
    ]] + [(name, ctypes.c_int) for name in ("B", "N", "width")]  # fmt: skip


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    """Return a function with the reference's signature and result, computed by the emulated kernel."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    here = Path(__file__).parent / "emulator"
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", f"-I{here}", f"-I{ROOT}/csrc/include"]
    subprocess.run([*command, here / "select_topk.cpp", "-o", library], check=True)
    entry = ctypes.CDLL(str(library)).emulate

    def run(scores, keep, code, width, *, shared_limit=H100_LIMIT, seed=0, skipped_barrier=0):
        (B, N), one = scores.shape, isinstance(keep, int)
        index = torch.full((B, width), -99)
        count = torch.full((B,), -99)
        args = Args(
            scores.data_ptr(), scores.stride(0), None if one else keep.data_ptr(), 0 if one else keep.stride(0),
            keep if one else 0, None if code is None else code.data_ptr(), 0 if code is None else code.stride(0),
            index.data_ptr(), count.data_ptr(), B, N, width,
        )  # fmt: skip
        assert entry(ctypes.byref(args), shared_limit, seed, skipped_barrier) == 0
        return index, count

    return run


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
@pytest.mark.parametrize("N", SIZES)
def test_equals_reference(emulate, make_case, N, coded):
    scores, keep, code = make_case(N, coded, seed=N)
    got = emulate(scores, keep, code, N, seed=N)
    expected = reference.select_topk(scores, keep, code, N)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "N, limit", [(0, H100_LIMIT), (4160, SMALL_LIMIT), (16448, H100_LIMIT), (16448, SMALL_LIMIT)]
)
def test_long_rows_with_and_without_cached_keys(emulate, make_case, N, limit):
    scores, keep, code = (x[2:5] for x in make_case(N, True, seed=1))
    expected = reference.select_topk(scores, keep, code, N)
    torch.testing.assert_close(emulate(scores, keep, code, N, shared_limit=limit), expected, rtol=0, atol=0)


def test_65536_equal_scores(emulate):
    """Counts of a full row do not run over into each other."""
    scores = torch.zeros(1, 65536)
    index, count = emulate(scores, 65536, None, 65536)
    assert torch.equal(index[0], torch.arange(65536)) and count.tolist() == [65536]


def test_narrow_width_cuts_and_one_keep_serves_all_rows(emulate, make_case):
    scores, _, code = make_case(100, True, seed=3)
    expected = reference.select_topk(scores, 20, code, 15)
    assert (expected[1] > 15).any()
    assert same(emulate(scores, 20, code, 15), expected)
    assert same(emulate(scores, torch.tensor(20).expand(len(scores)), code, 15), expected)


def test_no_rows(emulate):
    index, count = emulate(torch.zeros(0, 5), 2, None, 2)
    assert index.shape == (0, 2) and count.shape == (0,)


@pytest.mark.parametrize("skipped", range(1, BARRIERS + 1))
def test_every_barrier_is_needed(emulate, skipped):
    """Without it, some order of the threads gives another result: proof that the emulator sees races."""
    g = torch.Generator().manual_seed(0)
    scores, keep = torch.randn(4, 1500, generator=g), torch.tensor([300, 700, 1100, 1400])
    expected = reference.select_topk(scores, keep, None, 1500)
    assert same(emulate(scores, keep, None, 1500), expected)
    orders = range(16)
    assert any(
        not same(emulate(scores, keep, None, 1500, seed=s, skipped_barrier=skipped), expected) for s in orders
    )
