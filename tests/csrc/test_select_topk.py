"""The CUDA select kernels, run thread by thread on the CPU, equal the reference; every one of their barriers is needed."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from helpers.select_cases import make_case
from vlmprune.ops import reference

ROOT = Path(__file__).parents[2]
H100_LIMIT, SMALL_LIMIT = 227 * 1024, 64 * 1024
SIZES = [1, 2, 31, 33, 640, 1023, 1024, 1025, 2944]
BARRIERS = 11  # one load, three a radix round, one emit
BARRIERS_IF_ALL_STAY = 3  # one load, one before the emit, one emit


POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
MAX_SEGMENTS = 256


class Args(ctypes.Structure):
    """SelectTopkArgs of csrc/include/vlmprune/select_topk.cuh."""

    _fields_ = [
        ("scores", POINTER), ("scores_stride", LONG), ("keep", POINTER), ("keep_stride", LONG), ("keep_all", LONG),
        ("code", POINTER), ("code_stride", LONG), ("threshold", POINTER), ("threshold_stride", LONG),
        ("threshold_all", FLOAT), ("has_threshold", INT), ("index", POINTER), ("count", POINTER),
        ("B", INT), ("N", INT), ("width", INT),
    ]  # fmt: skip


class SegmentsArgs(ctypes.Structure):
    """SelectSegmentsArgs of csrc/include/vlmprune/select_segments.cuh."""

    _fields_ = [
        ("scores", POINTER), ("scores_stride", LONG), ("index", POINTER), ("B", INT), ("width", INT), ("longest", INT),
        ("count", INT), ("starts", INT * (MAX_SEGMENTS + 1)), ("slots", INT * (MAX_SEGMENTS + 1)),
    ]  # fmt: skip


def per_row(x):
    """(address, stride, value for all rows) of a tensor or a number."""
    return (x.data_ptr(), x.stride(0), 0) if isinstance(x, torch.Tensor) else (None, 0, x or 0)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    here = Path(__file__).parent / "emulator"
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", f"-I{here}", f"-I{ROOT}/csrc/include"]
    subprocess.run([*command, here / "select_topk.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def emulate(library):
    """Return a function with the reference's signature and result, computed by the emulated kernel."""

    def run(scores, keep, code, width, threshold=None, *, shared_limit=H100_LIMIT, seed=0, skipped_barrier=0):
        B, N = scores.shape
        index = torch.full((B, width), -99)
        count = torch.full((B,), -99)
        args = Args(
            scores.data_ptr(), scores.stride(0), *per_row(keep), *per_row(code)[:2], *per_row(threshold),
            threshold is not None, index.data_ptr(), count.data_ptr(), B, N, width,
        )  # fmt: skip
        if library.emulate_select_topk(ctypes.byref(args), shared_limit, seed, skipped_barrier):
            raise RuntimeError("the launch is refused, or the kernel breaks a rule of the emulator")
        return index, count

    return run


@pytest.fixture
def emulate_segments(library):
    """Return a function with the reference's signature and result, computed by the emulated kernel."""

    def run(scores, segments, quotas, *, shared_limit=H100_LIMIT, seed=0):
        starts, slots = ([0, *itertools.accumulate(x)] for x in (segments, quotas))
        index = torch.full((len(scores), sum(quotas)), -99)
        bounds = INT * (MAX_SEGMENTS + 1)
        args = SegmentsArgs(
            scores.data_ptr(), scores.stride(0), index.data_ptr(), len(scores), sum(quotas), max(segments),
            len(segments), bounds(*starts), bounds(*slots),
        )  # fmt: skip
        assert library.emulate_select_segments(ctypes.byref(args), shared_limit, seed) == 0
        return index

    return run


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
@pytest.mark.parametrize("N", SIZES)
def test_equals_reference(emulate, N, coded):
    scores, keep, code = make_case(N, coded, seed=N)
    got = emulate(scores, keep, code, N, seed=N)
    expected = reference.select_topk(scores, keep, code, N)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "N, limit", [(0, H100_LIMIT), (4160, SMALL_LIMIT), (16448, H100_LIMIT), (16448, SMALL_LIMIT)]
)
def test_long_rows_with_and_without_cached_keys(emulate, N, limit):
    scores, keep, code = (x[2:5] for x in make_case(N, True, seed=1))
    expected = reference.select_topk(scores, keep, code, N)
    torch.testing.assert_close(emulate(scores, keep, code, N, shared_limit=limit), expected, rtol=0, atol=0)


THRESHOLDS = [0.25, -0.0, 1e-44, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
@pytest.mark.parametrize("N", [1, 640, 1025])
def test_thresholds_equal_reference(emulate, N, coded):
    """One for all rows, or one a row; as a cap's companion and alone."""
    scores, keep, code = make_case(N, coded, seed=N + 1)
    a_row = torch.tensor(THRESHOLDS * 2)[: len(scores)]
    for threshold, cap in ((a_row, keep), (a_row.repeat_interleave(2)[::2], N), (0.25, N // 3), (-0.0, keep)):
        got = emulate(scores, cap, code, N, threshold, seed=N)
        expected = reference.select_topk(scores, cap, code, N, threshold)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("keep", [0, 1, 639, 640])
@pytest.mark.parametrize("value", [0.25, -0.0, float("inf"), -float("inf"), float("nan"), 1e-44])
def test_equal_scores_fill_up_from_the_left(emulate, value, keep):
    index, count = emulate(torch.full((1, 640), value), keep, None, keep)
    assert index.tolist() == [list(range(keep))] and count.tolist() == [keep]


@pytest.mark.parametrize("limit", [H100_LIMIT, SMALL_LIMIT])
def test_segments_equal_reference(emulate_segments, limit):
    segments = [640, 0, 1, 33, 1025, 2, 14000, 7]
    quotas = [100, 0, 1, 33, 700, 0, 9, 3]
    scores = make_case(sum(segments), False, seed=5)[0][1:6]
    expected = reference.select_segments(scores, segments, quotas)
    assert torch.equal(emulate_segments(scores, segments, quotas, shared_limit=limit, seed=3), expected)


def test_as_many_segments_as_a_launch_takes(emulate_segments):
    segments, quotas = [5] * MAX_SEGMENTS, [s % 6 for s in range(MAX_SEGMENTS)]
    scores = make_case(sum(segments), False, seed=6)[0][5:6]
    assert torch.equal(
        emulate_segments(scores, segments, quotas), reference.select_segments(scores, segments, quotas)
    )


def test_65536_equal_scores(emulate):
    """Counts of a full row do not run over into each other."""
    scores = torch.zeros(1, 65536)
    for keep in (65535, 65536):
        index, count = emulate(scores, keep, None, keep)
        assert torch.equal(index[0], torch.arange(keep)) and count.tolist() == [keep]


def test_narrow_width_cuts_and_one_keep_serves_all_rows(emulate):
    scores, _, code = make_case(100, True, seed=3)
    expected = reference.select_topk(scores, 20, code, 15)
    assert (expected[1] > 15).any()
    assert same(emulate(scores, 20, code, 15), expected)
    assert same(emulate(scores, torch.tensor(20).expand(len(scores)), code, 15), expected)


def test_no_rows(emulate):
    index, count = emulate(torch.zeros(0, 5), 2, None, 2)
    assert index.shape == (0, 2) and count.shape == (0,)


@pytest.mark.parametrize("some_stay, skipped", [
    *((True, n + 1) for n in range(BARRIERS)), *((False, n + 1) for n in range(BARRIERS_IF_ALL_STAY))
])  # fmt: skip
def test_every_barrier_is_needed(emulate, some_stay, skipped):
    """Without it, some order of the threads gives another result: proof that the emulator sees races."""
    g = torch.Generator().manual_seed(0)
    scores, quota = torch.randn(4, 1500, generator=g), torch.tensor([300, 700, 1100, 1400])
    args = (scores, quota, None, 1500, None) if some_stay else (scores, 1500, None, 1500, 0.0)
    expected = reference.select_topk(*args)
    assert same(emulate(*args), expected)

    def goes_wrong(seed):
        try:
            return not same(emulate(*args, seed=seed, skipped_barrier=skipped), expected)
        except RuntimeError:  # threads wait at different points
            return True

    assert any(map(goes_wrong, range(16)))
