"""prune_tokens: the fused drop against the three ops it joins, padding, gradients, CUDA graphs, then error text."""

from math import inf, nan

import pytest
import torch
from torch.library import opcheck

from helpers import slow
from vlmprune import ops
from vlmprune.ops.scoring import Scoring
from vlmprune.ops.selection import Selection

BACKENDS = ["reference", "triton"]


def run(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return ops.prune_tokens(*args, **kwargs)


def problem(device, **shape):
    """Query, key, the tensors to shorten, rows, columns, and a mask that hides as many positions as columns are padded."""
    query, key, rows, columns = slow.inputs(device=device, **shape)
    (B, Hkv, S, D) = key.shape
    g = torch.Generator().manual_seed(1)
    hidden, value = (
        torch.randn(B, S, 10, generator=g).to(device),
        torch.randn(B, Hkv, S, D, generator=g).to(device),
    )
    mask = torch.ones(B, S, dtype=torch.bool, device=device)
    free = [s for s in range(S) if s not in columns[-1].tolist() + rows[-1].tolist()]
    mask[-1, free[:2]] = False
    return query, key, [hidden, key, value, torch.arange(S, device=device)[None], mask], rows, columns, mask


def survivors(scores, columns, keep, mask):
    """Positions that stay, one sample at a time."""
    kept = []
    for values, places, visible in zip(scores.tolist(), columns.tolist(), mask.tolist(), strict=True):
        competing = [(-v, c) for v, c in zip(values, places, strict=True) if c >= 0 and visible[c]]
        best = {c for _, c in sorted(competing)[:keep]}
        kept.append([s for s, ok in enumerate(visible) if ok and (s not in places or s in best)])
    return kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "keep, head_reduce, normalize",
    [(keep, "mean", "row") for keep in (0, 1, 4, 9)] + [(4, "max", "columns"), (4, "sum", "none")],
)
def test_keeps_text_and_the_best_columns(backend, keep, head_reduce, normalize, device):
    query, key, tensors, rows, columns, mask = problem(device)
    scoring = dict(rows=rows, columns=columns, key_mask=mask, head_reduce=head_reduce, normalize=normalize)
    M = key.shape[2] - columns.shape[1] + keep
    out = run(backend, query, key, tensors, keep=keep, width=M, **scoring)
    with ops.use_backend(backend):
        scores = ops.received_attention(query, key, **scoring)
        gathered = ops.gather_tokens(tensors, out.index)
    assert torch.equal(out.scores, scores)
    expected = survivors(scores, columns, keep, mask)
    assert out.count.tolist() == [len(kept) for kept in expected]
    assert out.index.tolist() == [kept + [-1] * (M - len(kept)) for kept in expected]
    assert all(map(torch.equal, out.tensors, gathered))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotated", [False, True])
def test_triton_equals_reference(dtype, rotated, device):
    query, key, tensors, rows, columns, mask = problem(device, dtype=dtype, S=80, Sq=80, R=20, N=60)
    rope = slow.rope(S=80, device=device) if rotated else None
    kwargs = dict(rows=rows, columns=columns, keep=17, key_mask=mask, rope=rope)
    out, expected = (run(backend, query, key, tensors, **kwargs) for backend in ("triton", "reference"))
    torch.testing.assert_close(out.scores, expected.scores, rtol=2e-3 if rotated else 1e-5, atol=1e-5)
    if dtype == torch.float32:  # elsewhere two scores closer than the rounding may swap
        assert torch.equal(out.index, expected.index)
        assert all(map(torch.equal, out.tensors, expected.tensors))
    assert torch.equal(out.count, expected.count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sample_may_keep_another_number(backend, device):
    query, key, tensors, rows, columns, mask = problem(device, B=3)
    keep = torch.tensor([2, 100, -4], device=device)  # clamped to 0..9, the last sample has 7 columns
    out = run(backend, query, key, tensors, rows=rows, columns=columns, keep=keep, key_mask=mask)
    with ops.use_backend(backend):
        scores = ops.received_attention(query, key, rows=rows, columns=columns, key_mask=mask)
    for b, n in enumerate((2, 9, 0)):
        (kept,) = survivors(scores[b : b + 1], columns[b : b + 1], n, mask[b : b + 1])
        assert out.index[b].tolist() == kept + [-1] * (21 - len(kept)) and out.count[b] == len(kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "values, kept",
    [
        ([1.0, 1.0, 1.0, 1.0], [0, 1]),
        ([-inf, nan, -inf, nan], [0, 2]),
        ([nan, nan, nan, nan], [0, 1]),
        ([nan, -inf, nan, 5.0], [1, 3]),
        ([-0.0, 0.0, -1.0, 0.0], [0, 1]),
    ],
)
def test_scores_that_are_hard_to_order(backend, values, kept, device):
    """Logits are the values themselves: the only query is 1 at the first place, the keys are the values there."""
    key = torch.zeros(1, 1, 5, 16, dtype=torch.float16, device=device)
    key[0, 0, :4, 0] = torch.tensor(values, device=device)
    query = torch.zeros(1, 1, 1, 16, dtype=torch.float16, device=device)
    query[..., 0] = 1
    rows, columns = torch.tensor([[4]], device=device), torch.arange(4, device=device)[None]
    call = dict(rows=rows, columns=columns, keep=2, normalize="none", scale=1.0)
    for reduce in ("mean", "max", "sum"):
        out = run(backend, query, key, [key], **call, row_reduce=reduce, head_reduce=reduce)
        assert out.index.tolist() == [[*kept, 4]]


def test_two_launches_with_a_log_sum_exp_and_three_without(device):
    from vlmprune.triton_kernels._launch import recording

    query, key, tensors, rows, columns, mask = problem(device, Sq=21)
    lse = ops.row_lse(query, key, torch.arange(21, device=device).expand(2, -1), mask)
    for given, names in ((lse, []), (None, ["_row_lse_kernel"])):
        with recording() as launches:
            run("triton", query, key, tensors, rows=rows, columns=columns, keep=3, key_mask=mask, lse=given)
        expected = [*names, "_score_select_kernel", "_gather_tokens_kernel"]
        assert [launch.kernel.__name__ for launch in launches] == expected


def test_the_same_bits_every_time(device):
    query, key, tensors, rows, columns, mask = problem(device, H=8, Hkv=8)
    call = dict(rows=rows, columns=columns, keep=3, key_mask=mask)
    first, second = (run("triton", query, key, tensors, **call) for _ in range(2))
    assert torch.equal(first.scores, second.scores) and torch.equal(first.index, second.index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unpadded_batch_fills_the_index(backend, device):
    query, key, tensors, rows, columns, _ = problem(device, B=1, S=21, N=21, Sq=21, R=1)
    out = run(backend, query, key, tensors, rows=rows, columns=columns, keep=5)
    assert out.index.shape == (1, 5) and out.count.tolist() == [5] and out.index.ge(0).all()
    lse = ops.row_lse(query, key, torch.arange(21, device=device)[None])
    again = run(backend, query, key, tensors, rows=rows, columns=columns, keep=5, lse=lse)
    assert torch.equal(again.index, out.index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_fits_whatever_its_padding(backend, device):
    """Without a mask the second sample, whose two padding columns leave two more text positions, is the longer one."""
    query, key, tensors, rows, columns, _ = problem(device)
    call = dict(rows=rows, columns=columns, keep=3)
    out, (S, N) = run(backend, query, key, tensors, **call), (key.shape[2], columns.shape[1])
    M = S - N + 3
    assert out.index.shape == (2, S) and out.count.tolist() == [M, M + 2]
    assert out.index.ge(0).sum(1).tolist() == out.count.tolist()
    narrow = run(backend, query, key, tensors, width=M, **call)
    assert torch.equal(narrow.index, out.index[:, :M]) and torch.equal(narrow.count, out.count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_columns_are_dropped(backend, device):
    query, key, tensors, rows, columns, mask = problem(device)
    mask[0, columns[0, 0]] = False
    out = run(backend, query, key, tensors, rows=rows, columns=columns, keep=9, key_mask=mask)
    assert columns[0, 0].item() not in out.index[0].tolist()
    assert out.count[0] == key.shape[2] - 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, R, N", [(0, 2, 3), (1, 0, 3), (1, 2, 0)], ids=["B=0", "R=0", "N=0"])
def test_empty(backend, B, R, N, device):
    query, key, rows, columns = slow.inputs(B=1, R=2, N=3, device=device)
    lists = dict(rows=rows[:B, :R], columns=columns[:B, :N])
    out = run(backend, query[:B], key[:B], [key[:B]], keep=min(1, N), **lists)
    M = 21 - N + min(1, N)
    assert out.tensors[0].shape == (B, 2, M if B else 21, 24) and out.count.tolist() == [M] * B
    assert out.scores.shape == (B, N)
    if R == 0:  # nothing scored: every column ties, the first stays
        assert columns[0, 0] in out.index and columns[0, 1] not in out.index


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_flows_through_the_gathered_tensors(backend, device):
    query, key, tensors, rows, columns, mask = problem(device)
    hidden, cos = tensors[0].requires_grad_(), torch.randn(1, 21, 4, device=device, requires_grad=True)
    out = run(
        backend,
        query.requires_grad_(),
        key,
        [hidden, cos, tensors[3]],
        rows=rows,
        columns=columns,
        keep=3,
        key_mask=mask,
    )
    assert not out.scores.requires_grad and not out.index.requires_grad and not out.tensors[2].requires_grad
    (out.tensors[0].sum() + 2 * out.tensors[1].sum()).backward()
    kept = torch.zeros(2, 22, device=device).scatter(1, out.index.where(out.index >= 0, 21), 1.0)[:, :21]
    assert query.grad is None
    assert torch.equal(hidden.grad, kept[..., None].expand(2, 21, 10))
    assert torch.equal(cos.grad, 2 * kept.sum(0)[None, :, None].expand(1, 21, 4))


@pytest.mark.parametrize("rotated", [False, True])
def test_schema_and_fake_agree(rotated, device):
    query, key, tensors, rows, columns, mask = problem(device)
    rope = slow.rope(device=device) if rotated else None
    tensors[0].requires_grad_()
    scoring = Scoring.checked(query, key, rows=rows, columns=columns, key_mask=mask, scale=0.2, rope=rope)
    selection = Selection.checked(query, 2, 9, 21, keep=3, width=18)
    opcheck(torch.ops.vlmprune.prune_tokens.default, (tensors, *selection, *scoring))


def test_compiles_without_graph_breaks(device):
    query, key, tensors, rows, columns, mask = problem(device)

    def prune(query, key, tensors):
        return ops.prune_tokens(query, key, tensors, rows=rows, columns=columns, keep=3, key_mask=mask)

    out = torch.compile(prune, backend="aot_eager", fullgraph=True, dynamic=True)(query, key, tensors)
    expected = prune(query, key, tensors)
    assert torch.equal(out.index, expected.index) and all(map(torch.equal, out.tensors, expected.tensors))


@pytest.mark.gpu
def test_runs_in_a_cuda_graph_without_waiting(device):
    query, key, tensors, rows, columns, mask = problem(device)

    def prune():
        return run("triton", query, key, tensors, rows=rows, columns=columns, keep=3, key_mask=mask)

    expected = prune()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prune()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)  # filling new memory is not ours to capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prune()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.index, expected.index) and all(map(torch.equal, out.tensors, expected.tensors))


ERRORS = [
    (dict(tensors=lambda a: a["key"]), r"^tensors: expected a list or tuple of tensors, got Tensor$"),
    (
        dict(tensors=lambda a: [a["key"], torch.ones(2, 20)]),
        r"^tensors\[1\]: expected 21 positions, got \(2, 20\)$",
    ),
    (dict(rows=lambda a: a["rows"].int()), r"^rows: expected int64, got torch\.int32$"),
    (dict(columns=lambda a: a["columns"][0]), r"^columns: expected \[2, N\], got \(9,\)$"),
    (
        dict(columns=lambda a: torch.zeros(2, 22).long()),
        r"^columns: expected at most the 21 positions of key, got 22$",
    ),
    (dict(keep=lambda a: 10), r"^keep: expected a whole number in 0\.\.9, got 10$"),
    (dict(width=lambda a: 22), r"^width: expected a whole number in 0\.\.21, got 22$"),
    (dict(keep=lambda a: torch.tensor([1, 2]).int()), r"^keep: expected int64, got torch\.int32$"),
    (dict(keep=lambda a: torch.tensor([1, 2, 3])), r"^keep: expected \[2\], got \(3,\)$"),
    (dict(rows=lambda a: a["rows"] + 5), r"^rows: expected positions in \[8, 21\) or -1, got "),
    (dict(keep=lambda a: 0.5), r"^keep: expected a whole number in 0\.\.9, got 0\.5$"),
    (dict(key_mask=lambda a: torch.ones(2, 21)), r"^key_mask: expected bool, got torch\.float32$"),
    (
        dict(lse=lambda a: torch.ones(2, 4, 13), normalize=lambda a: "none"),
        r"^lse: expected None unless normalize is 'row', got a tensor with normalize='none'$",
    ),
    (dict(row_weight=lambda a: torch.ones(5)), r"^row_weight: expected \[2, 5\], got \(5,\)$"),
    (dict(head_reduce=lambda a: "median"), r"^head_reduce: expected one of mean, max, sum, got 'median'$"),
    (dict(head_reduce=lambda a: "none"), r"^head_reduce: expected one of mean, max, sum, got 'none'$"),
    (dict(row_reduce=lambda a: "all"), r"^row_reduce: expected one of mean, max, sum, got 'all'$"),
    (dict(normalize=lambda a: "all"), r"^normalize: expected one of row, columns, none, got 'all'$"),
    (dict(rope=lambda a: "yes"), r"^rope: expected a pair \(cos, sin\), got str$"),
]


@pytest.mark.parametrize("changes, message", ERRORS)
def test_error_text(changes, message):
    query, key, rows, columns = slow.inputs()
    args = dict(query=query, key=key, tensors=[key], rows=rows, columns=columns, keep=3)
    args |= {name: change(args) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        ops.prune_tokens(args.pop("query"), args.pop("key"), args.pop("tensors"), **args)
