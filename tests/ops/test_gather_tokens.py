"""gather_tokens: exact copies of every rank and dtype, one launch for many, gradients, then error text."""

import pytest
import torch
from torch.library import opcheck

from vlmprune import ops

BACKENDS = ["reference", "triton"]
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


def run(backend, tensors, index):
    with ops.use_backend(backend):
        return ops.gather_tokens(tensors, index)


def make_index(B, S, K, device, padding=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.stack(
        [torch.randperm(S, generator=g)[:K].sort().values for _ in range(B)] or [torch.zeros(K).long()]
    )
    index = index[:B]
    index[-1:, max(K - padding, 0) :] = -1
    return index.to(device)


def random_bits(*shape, dtype, device, seed=0):
    """Any bit pattern, NaN included: a copy must not look at values."""
    size = torch.empty((), dtype=dtype).element_size()
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return (torch.rand(shape, generator=g) < 0.5).to(device)
    raw = torch.randint(0, 256, (*shape, size), generator=g, dtype=torch.uint8)
    return raw.view(dtype).view(shape).to(device)


def by_hand(x, index):
    """One row at a time."""
    out = []
    for b, kept in enumerate(index.tolist()):
        sample = x[b if x.shape[0] == index.shape[0] else 0]
        rows = [
            sample[..., s, :] if x.ndim > 2 else sample[s]
            for s in range(sample.shape[x.ndim - 3 if x.ndim > 2 else 0])
        ]
        picked = [rows[s] if s >= 0 else torch.zeros_like(rows[0]) for s in kept]
        out.append(torch.stack(picked, dim=-2 if x.ndim > 2 else 0))
    return torch.stack(out)


def same(out, x):
    """Bit for bit."""
    assert out.dtype == x.dtype and out.shape == x.shape
    return torch.equal(out.contiguous().view(torch.uint8), x.contiguous().view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 23), (2, 23, 5), (2, 3, 23, 8)], ids=["rank 2", "rank 3", "rank 4"])
def test_copies_bits(backend, dtype, shape, device):
    x, index = random_bits(*shape, dtype=dtype, device=device), make_index(2, 23, 9, device, padding=2)
    (out,) = run(backend, [x], index)
    assert out.is_contiguous() and same(out, by_hand(x, index))


SHAPES = [
    pytest.param(1, 1, 1, 1, id="one"),
    pytest.param(2, 577, 193, 64, id="odd-S"),
    pytest.param(1, 40, 17, 1030, id="D-tail"),
    pytest.param(1, 40, 33, 300, id="D-two-blocks"),
    pytest.param(3, 16, 16, 7, id="all"),
]


@pytest.mark.parametrize("B, S, K, D", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_shapes(B, S, K, D, dtype, device):
    x, index = random_bits(B, S, D, dtype=dtype, device=device), make_index(B, S, K, device)
    assert same(run("triton", [x], index)[0], by_hand(x, index))


def layers(device, n=5, B=2, S=19):
    """Hidden, positions, cos and sin, a mask, and n layers of keys and values: the ranks and dtypes of a real drop."""
    caches = [torch.randn(B, 2, S, 8, device=device).bfloat16() for _ in range(2 * n)]
    hidden = torch.randn(B, S, 40, device=device)
    cos, sin = torch.randn(1, S, 8, device=device), torch.randn(1, S, 8, device=device)
    positions = torch.arange(S, device=device)[None]
    return [hidden, positions, cos, sin, torch.rand(B, S, device=device) < 0.5, *caches]


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tensors_keep_their_order(backend, device):
    tensors, index = layers(device), make_index(2, 19, 7, device, padding=1)
    outs = run(backend, tensors, index)
    assert len(outs) == len(tensors)
    assert all(same(out, by_hand(x, index)) for out, x in zip(outs, tensors, strict=True))


@pytest.mark.parametrize("n, launches", [(1, 1), (64, 1), (65, 2)])
def test_up_to_64_tensors_take_one_launch(n, launches, device, monkeypatch):
    from vlmprune.triton_kernels import _rows

    calls, launch = [], _rows.launch
    monkeypatch.setattr(_rows, "launch", lambda *args, **meta: (calls.append(args), launch(*args, **meta)))
    tensors, index = (
        [torch.full((1, 4, 2), float(i), device=device) for i in range(n)],
        make_index(1, 4, 2, device),
    )
    outs = run("triton", tensors, index)
    assert len(calls) == launches
    assert [out[0, 0, 0].item() for out in outs] == list(map(float, range(n)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, device):
    index = make_index(2, 12, 5, device)
    packed = torch.randn(2, 12, 3, 16, device=device)
    tensors = [
        packed.transpose(1, 2)[..., 4:10],
        packed[:, :, 1, :7],
        packed[..., 0, 3],
        packed[:1, :, 2].expand(2, -1, -1),
    ]
    assert not any(x.is_contiguous() for x in tensors)
    for out, x in zip(run(backend, tensors, index), tensors, strict=True):
        assert torch.equal(out, by_hand(x, index))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_row_gives_zeros(backend, device):
    """As on a GPU, where nobody looks at the index first; nothing around the tensors is read."""
    from vlmprune.ops import reference
    from vlmprune.triton_kernels import gather_tokens as triton_kernels

    gather = (triton_kernels if backend == "triton" else reference).gather_tokens
    around = torch.full((2, 40, 6), float("nan"), device=device)
    x, short = around[:, 10:30].fill_(1.0), torch.ones(1, 3, device=device)
    index = torch.tensor([[0, 19, 20, 25, -1], [2, 3, 1 << 40, -(1 << 40), -7]], device=device)
    for out, y in zip(gather([x, short, around[:, :0]], index), (x, short, around[:, :0]), strict=True):
        is_row = ((index >= 0) & (index < y.shape[1])).float()
        assert torch.equal(out, is_row[..., None].expand_as(out) if out.ndim == 3 else is_row)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, K, D", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["B=0", "K=0", "D=0"])
def test_empty(backend, B, K, D, device):
    x, positions = torch.ones(B, 6, D, device=device), torch.ones(1, 6, device=device)
    out, ids = run(backend, [x, positions], torch.zeros(B, K, dtype=torch.int64, device=device))
    assert out.shape == (B, K, D) and ids.shape == (B, K)
    assert run(backend, [], torch.zeros(B, K, dtype=torch.int64, device=device)) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 7), (2, 7, 3), (2, 2, 7, 3), (1, 7, 3), (1, 2, 7, 3)], ids=str)
def test_gradient_is_the_numeric_one(backend, shape, device):
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.tensor([[0, 2, 2, -1], [1, 5, 6, -1]], device=device)  # a repeated row adds up
    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: ops.gather_tokens([x], index)[0], (x,), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_only_what_asked(backend, device):
    hidden = torch.randn(2, 9, 4, device=device, requires_grad=True)
    frozen, positions = torch.randn(2, 9, 4, device=device), torch.arange(9, device=device)[None]
    index = make_index(2, 9, 3, device)
    out, still, ids = run(backend, [hidden, frozen, positions], index)
    assert not ids.requires_grad
    (out.sum() + still.sum()).backward()
    assert frozen.grad is None
    kept = torch.zeros(2, 9, device=device).scatter(1, index, 1.0)
    assert torch.equal(hidden.grad, kept[..., None].expand(2, 9, 4))


def test_schema_and_fake_agree(device):
    index = make_index(2, 19, 7, device, padding=1)
    hidden = torch.randn(2, 19, 4, device=device, requires_grad=True)
    for tensors in (layers(device, n=1), [hidden], [torch.randn(2, 3, 19, 4, device=device)]):
        opcheck(torch.ops.vlmprune.gather_tokens.default, (tensors, index))


def test_compiles_without_graph_breaks(device):
    x, index = torch.randn(2, 9, 4, device=device, requires_grad=True), make_index(2, 9, 3, device)

    def gather(x):
        return ops.gather_tokens([x, x * 2], index)[1].sum()

    compiled = torch.compile(gather, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(gather(x), x)
    (grad,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(grad, expected)


INDEX = torch.zeros(2, 3, dtype=torch.int64)
ERRORS = [
    (([torch.ones(2, 4)], INDEX.int()), r"^index: expected int64, got torch\.int32$"),
    (([torch.ones(2, 4)], INDEX[0]), r"^index: expected rank 2 \[B, K\], got \(3,\)$"),
    ((torch.ones(2, 4), INDEX), r"^tensors: expected a list or tuple of tensors, got Tensor$"),
    (([torch.ones(2, 4), None], INDEX), r"^tensors\[1\]: expected a tensor, got NoneType$"),
    (
        ([torch.ones(4)], INDEX),
        r"^tensors\[0\]: expected rank 2 \[B, S\], 3 \[B, S, D\] or 4 \[B, H, S, D\], got \(4,\)$",
    ),
    (
        ([torch.ones(2, 4).cdouble()], INDEX),
        r"^tensors\[0\]: expected a dtype of at most 8 bytes, got torch\.complex128$",
    ),
    (([torch.ones(3, 4)], INDEX), r"^tensors\[0\]: expected a first dim of 2 or 1, got \(3, 4\)$"),
    (
        ([torch.ones(2, 5, 4).mT], INDEX),
        r"^tensors\[0\]: expected a contiguous last dim, got strides \(20, 1, 4\)$",
    ),
    (
        ([torch.ones(2, 4), torch.ones(1, 3, 8)], INDEX + 3),
        r"^index: expected positions in \[0, 3\) or -1, got 3$",
    ),
    (([torch.ones(2, 4)], INDEX - 2), r"^index: expected positions in \[0, 4\) or -1, got -2$"),
    (([torch.ones(2, 4, device="meta")], INDEX), r"^tensors\[0\]: expected the device cpu, got meta$"),
]


@pytest.mark.parametrize("args, message", ERRORS)
def test_error_text(args, message):
    with pytest.raises(ValueError, match=message):
        ops.gather_tokens(*args)
