"""The CUDA backend says why it cannot run; where it can, it equals the reference."""

import pytest
import torch

from vlmprune.ops import _native, reference

CUDA = torch.device("cuda")
WHY_NOT_HERE = _native.needs_extension(CUDA, False) if torch.cuda.is_available() else "no CUDA device"

gpu = pytest.mark.gpu
needs_backend = pytest.mark.skipif(WHY_NOT_HERE is not None, reason=str(WHY_NOT_HERE))


@pytest.fixture
def why_not(monkeypatch, tmp_path):
    """Return a function (built, device) -> reason, with a library that exists or does not."""

    def ask(built: bool, device: str) -> str | None:
        library = tmp_path / "_C.abi3.so"
        if built:
            library.touch()
        monkeypatch.setattr(_native, "LIBRARY", library)
        return _native.needs_extension.__wrapped__(torch.device(device), False)

    return ask


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_not_built(why_not, device):
    expected = "the CUDA extension is not built (VLMPRUNE_BUILD_CUDA=1 pip install --no-build-isolation .)"
    assert why_not(False, device) == expected


def test_cpu_tensor(why_not):
    assert why_not(True, "cpu") == "needs a CUDA tensor, got one on cpu"


def test_pytorch_without_cuda(why_not, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_not(True, "cuda") == "this PyTorch was built without CUDA"


@pytest.mark.parametrize("capability, reason", [
    ((7, 5), "needs compute capability 8.0 or newer, got 7.5"), ((8, 0), None), ((12, 0), None),
])  # fmt: skip
def test_old_gpu(why_not, monkeypatch, capability, reason):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert why_not(True, "cuda") == reason


@gpu
@needs_backend
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
@pytest.mark.parametrize("N", [0, 1, 33, 640, 4160, 16448, 65536])
def test_select_topk_equals_reference(make_case, N, coded):
    scores, keep, code = make_case(N, coded, seed=N)
    expected = reference.select_topk(scores, keep, code, N)
    select_topk = _native.load("select_topk")
    on_gpu = (scores.cuda(), keep.cuda(), None if code is None else code.cuda(), N)
    for _ in range(3):
        got = tuple(x.cpu() for x in select_topk(*on_gpu))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@gpu
@needs_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_select_topk_takes_any_dtype_and_stride(dtype):
    scores = torch.randn(640, 3, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    code = torch.arange(3 * 640, dtype=torch.int16).remainder(3).to(torch.int8).view(640, 3).t()
    expected = reference.select_topk(scores, 100, code, 640)
    got = tuple(x.cpu() for x in _native.load("select_topk")(scores.cuda(), 100, code.cuda(), 640))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@gpu
@needs_backend
def test_select_topk_replays_in_a_graph():
    scores = torch.randn(2, 640, device=CUDA)
    select_topk = _native.load("select_topk")
    select_topk(scores, 128, None, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index, _ = select_topk(scores, 128, None, 128)
    scores.normal_()
    graph.replay()
    assert torch.equal(index.cpu(), reference.select_topk(scores.cpu(), 128, None, 128)[0])


@gpu
@needs_backend
def test_select_topk_names_the_wrong_argument():
    scores, keep = torch.zeros(2, 8, device=CUDA), torch.ones(2, dtype=torch.int64, device=CUDA)
    select_topk = _native.load("select_topk")
    with pytest.raises(RuntimeError, match=r"scores: expected float32, float16 or bfloat16 \[B, N\]"):
        select_topk(scores.double(), keep, None, 8)
    with pytest.raises(RuntimeError, match=r"keep: expected int64 \[B\] on the device of scores, got \[3\]"):
        select_topk(scores, keep.new_ones(3), None, 8)
    with pytest.raises(RuntimeError, match=r"code: expected int8 \[B, N\]"):
        select_topk(scores, keep, keep, 8)
    with pytest.raises(RuntimeError, match=r"width: expected 0 or more, got -1"):
        select_topk(scores, keep, None, -1)
