"""compact_kv: exact moves in place of every dtype and layout, what stands behind them untouched, then error text."""

import pytest
import torch
from torch.library import opcheck

from vlmprune import ops

BACKENDS = ["reference", "triton"]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


def run(backend, caches, index):
    with ops.use_backend(backend):
        assert ops.compact_kv(caches, index) is None


def launcher(backend):
    """The function behind the op, which takes any index."""
    from vlmprune.ops import reference
    from vlmprune.triton_kernels import compact_kv

    return compact_kv.compact_kv if backend == "triton" else reference.compact_kv


def make_index(B, S, K, device, padding=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(S, generator=g)[:K].sort().values for _ in range(B)]
    index = torch.stack(rows) if rows else torch.zeros(0, K, dtype=torch.int64)
    index[-1:, max(K - padding, 0) :] = -1
    return index.to(device)


def random_bits(*shape, dtype, device, seed=0):
    """Any bit pattern, NaN included: a move must not look at values."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return (torch.rand(shape, generator=g) < 0.5).to(device)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=g, dtype=torch.uint8)
    return raw.view(dtype).view(shape).to(device)


def by_hand(x, index):
    """One row at a time, into a copy."""
    out, S = x.clone(), x.shape[-2]
    for b, kept in enumerate(index.tolist()):
        for k, row in enumerate(kept):
            if 0 <= row < S:
                out[b, ..., k, :] = x[b, ..., row, :]
    return out


def same(x, y):
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 23, 5), (2, 3, 23, 8)], ids=["rank 3", "rank 4"])
def test_moves_bits(backend, dtype, shape, device):
    x, index = random_bits(*shape, dtype=dtype, device=device), make_index(2, 23, 9, device, padding=2)
    expected = by_hand(x, index)
    run(backend, [x], index)
    assert same(x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "S, K, D", [(1, 1, 1), (577, 193, 130), (200, 200, 64), (64, 64, 64), (66, 65, 7)], ids=str
)
def test_shapes(backend, S, K, D, device):
    """One step and several, one block of columns and several, tails, all rows kept."""
    x, index = random_bits(2, 2, S, D, dtype=torch.bfloat16, device=device), make_index(2, S, K, device)
    expected = by_hand(x, index)
    run(backend, [x], index)
    assert same(x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0, 1, 63, 64, 65])
def test_every_row_moves_by_a_few(backend, shift, device):
    """Targets of one step are sources of the same or the step before: the order that overwrites too early shows."""
    S = 200
    x = torch.arange(S, device=device).view(1, 1, S, 1).expand(1, 2, S, 3).contiguous()
    run(backend, [x], torch.arange(shift, S, device=device)[None])
    kept = torch.arange(shift, S, device=device).view(1, 1, -1, 1).expand(1, 2, -1, 3)
    assert torch.equal(x[:, :, : S - shift], kept)
    assert torch.equal(x[:, :, S - shift :], kept[:, :, S - shift - S :] if shift else kept[:, :, :0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_many_layouts(backend, device):
    """Lengths, heads, widths and strides may all differ; memory between the rows of a view is not touched."""
    index = make_index(2, 19, 7, device, padding=1)
    packed = torch.randn(2, 21, 3, 16, device=device)
    packed_before = packed.clone()
    caches = [torch.randn(2, 2, 19 + i, 8, device=device).bfloat16() for i in range(3)]
    caches += [torch.randn(2, 30, 4, device=device), packed.transpose(1, 2)[..., 4:10]]
    where = [x.data_ptr() for x in caches]
    expected = [by_hand(x, index) for x in caches]
    run(backend, caches, index)
    assert all(same(x, y) for x, y in zip(caches, expected, strict=True))
    assert [x.data_ptr() for x in caches] == where
    packed_before.transpose(1, 2)[..., 4:10] = expected[-1]
    assert torch.equal(packed, packed_before)


@pytest.mark.parametrize("n, launches", [(1, 1), (64, 1), (65, 2)])
def test_up_to_64_caches_take_one_launch(n, launches, device, monkeypatch):
    from vlmprune.triton_kernels import _rows

    calls, launch = [], _rows.launch
    monkeypatch.setattr(_rows, "launch", lambda *args, **meta: (calls.append(args), launch(*args, **meta)))
    caches = [torch.arange(4.0, device=device).view(1, 1, 4, 1) + 10 * i for i in range(n)]
    caches = [x.clone() for x in caches]
    run("triton", caches, torch.tensor([[1, 3]], device=device))
    assert len(calls) == launches
    assert [x.flatten().tolist() for x in caches] == [[10 * i + v for v in (1, 3, 2, 3)] for i in range(n)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_row_stays(backend, device):
    """As on a GPU, where nobody looks at the index first; memory around the cache is neither read nor written."""
    around = torch.full((2, 2, 40, 6), float("nan"), device=device)
    x = around[:, :, 10:30]
    x.copy_(torch.randn(x.shape, device=device))
    index = torch.tensor([[1, 3, 20, 25, -1], [2, 5, 19, 1 << 40, -7]], device=device)
    expected = by_hand(x, index)
    launcher(backend)([x], index)
    assert torch.equal(x, expected)
    assert around[:, :, :10].isnan().all() and around[:, :, 30:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, H, K, D", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 0, 3, 4), (2, 2, 3, 0)], ids=str)
def test_empty(backend, B, H, K, D, device):
    x = torch.ones(B, H, 6, D, device=device)
    run(backend, [x], torch.arange(K, device=device).expand(B, K))
    assert torch.equal(x, torch.ones_like(x))
    run(backend, [], torch.zeros(B, K, dtype=torch.int64, device=device))


def test_agrees_with_gather(device):
    x, index = torch.randn(2, 3, 50, 16, device=device), make_index(2, 50, 20, device)
    (kept,) = ops.gather_tokens([x], index)
    ops.compact_kv([x], index)
    assert torch.equal(x[:, :, :20], kept)


def test_schema_and_fake_agree(device):
    index = make_index(2, 19, 7, device, padding=1)
    caches = [torch.randn(2, 3, 19, 4, device=device), torch.randn(2, 20, 4, device=device)]
    opcheck(torch.ops.vlmprune.compact_kv.default, (caches, index))


def test_compiles_without_graph_breaks(device):
    index = make_index(2, 9, 3, device)

    def step(x):
        x = x * 2
        ops.compact_kv([x], index)
        return x[:, :, :3].sum()

    x = torch.randn(2, 2, 9, 4, device=device)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), step(x))


INDEX = torch.tensor([[0, 1, 3], [0, 2, -1]])
X = torch.ones(2, 2, 4, 3)
ERRORS = [
    (([X], INDEX.int()), r"^index: expected int64, got torch\.int32$"),
    (([X], INDEX[0]), r"^index: expected rank 2 \[B, K\], got \(3,\)$"),
    ((X, INDEX), r"^caches: expected a list or tuple of tensors, got Tensor$"),
    (([X, None], INDEX), r"^caches\[1\]: expected a tensor, got NoneType$"),
    (([X[0, 0]], INDEX), r"^caches\[0\]: expected rank 3 \[B, S, D\] or 4 \[B, Hkv, S, D\], got \(4, 3\)$"),
    (([X.cdouble()], INDEX), r"^caches\[0\]: expected a dtype of at most 8 bytes, got torch\.complex128$"),
    (([X[:1]], INDEX), r"^caches\[0\]: expected a first dim of 2, got \(1, 2, 4, 3\)$"),
    (([X.mT], INDEX), r"^caches\[0\]: expected a contiguous last dim, got strides \(24, 12, 1, 3\)$"),
    (
        ([X[:, :1].expand(-1, 2, -1, -1)], INDEX),
        r"^caches\[0\]: expected memory of its own for every element, got strides \(24, 0, 3, 1\)$",
    ),
    (
        ([X.clone().requires_grad_()], INDEX),
        r"^caches\[0\]: expected no gradient \(it is changed in place\), got requires_grad=True$",
    ),
    (([X.to("meta")], INDEX), r"^caches\[0\]: expected the device cpu, got meta$"),
    (
        ([X, X[:, :, :2]], INDEX),
        r"^caches\[1\]: expected at least the 3 positions of index, got \(2, 2, 2, 3\)$",
    ),
    (([X, X.clone(), X], INDEX), r"^caches: expected no memory twice, got one tensor twice$"),
    (
        ([X], INDEX.flip(1)),
        r"^index: expected positions that ascend, then -1 only, got sample 0 with \[3, 1, 0\]$",
    ),
    (
        ([X], torch.tensor([[0, 1, 2], [1, 1, 2]])),
        r"^index: expected positions that ascend, then -1 only, got sample 1 with \[1, 1, 2\]$",
    ),
    (
        ([X], torch.tensor([[0, -1, 2], [0, 1, 2]])),
        r"^index: expected positions that ascend, then -1 only, got sample 0 with \[0, -1, 2\]$",
    ),
    (
        ([torch.ones(2, 9, 3), X], torch.tensor([[1, 2, 4], [0, 2, -1]])),
        r"^index: expected positions in \[0, 4\) or -1, got 4$",
    ),
]


@pytest.mark.parametrize("args, message", ERRORS)
def test_error_text(args, message):
    before = X.clone()
    with pytest.raises(ValueError, match=message):
        ops.compact_kv(*args)
    assert torch.equal(X, before)
