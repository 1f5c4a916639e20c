"""The CUDA backend says why it cannot run; where it can, it equals the reference."""

import pytest
import torch

from helpers.select_cases import make_case
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
def test_select_topk_equals_reference(N, coded):
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


@pytest.fixture
def row_case():
    """Hidden states, positions, a mask and more caches than one launch takes, and which rows stay."""
    g = torch.Generator().manual_seed(0)
    caches = [torch.randn(2, 2, 640 + i % 3, 72, generator=g).bfloat16() for i in range(70)]
    others = [
        torch.randn(2, 640, 4096, generator=g),
        torch.arange(640)[None],
        torch.rand(2, 640, generator=g) < 0.5,
    ]
    index = torch.stack([torch.randperm(640, generator=g)[:300].sort().values for _ in range(2)])
    index[1, 290:] = -1
    return others, caches, index


@gpu
@needs_backend
def test_gather_tokens_equals_reference(row_case):
    others, caches, index = row_case
    tensors = [*others, *caches, caches[0][..., 1:9]]
    outs = _native.load("gather_tokens")([x.cuda() for x in tensors], index.cuda())
    for out, want in zip(outs, reference.gather_tokens(tensors, index), strict=True):
        assert torch.equal(out.cpu(), want)


@gpu
@needs_backend
def test_compact_kv_equals_reference(row_case):
    _, caches, index = row_case
    on_gpu = [x.cuda() for x in caches]
    _native.load("compact_kv")(on_gpu, index.cuda())
    reference.compact_kv(caches, index)
    assert all(torch.equal(x.cpu(), want) for x, want in zip(on_gpu, caches, strict=True))


@gpu
@needs_backend
def test_positions_outside_are_masked():
    x = torch.ones(1, 2, 20, 8, device=CUDA)
    index = torch.tensor([[0, 19, 20, 1 << 40, -7]], device=CUDA)
    (out,) = _native.load("gather_tokens")([x], index)
    assert out.sum((0, 1, 3)).tolist() == [16, 16, 0, 0, 0]
    _native.load("compact_kv")([x], index)
    assert torch.equal(x, torch.ones_like(x))


@gpu
@needs_backend
def test_rows_replay_in_a_graph():
    x, cache = torch.randn(2, 64, 40, device=CUDA), torch.zeros(2, 2, 64, 32, device=CUDA)
    index = torch.arange(0, 64, 2, device=CUDA).expand(2, -1)
    gather, compact = _native.load("gather_tokens"), _native.load("compact_kv")
    gather([x], index), compact([cache], index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (out,) = gather([x], index)
        compact([cache], index)
    x.normal_(), cache.copy_(torch.randn_like(cache))
    kept = cache[:, :, ::2].clone()
    graph.replay()
    assert torch.equal(out, x[:, ::2]) and torch.equal(cache[:, :, :32], kept)
