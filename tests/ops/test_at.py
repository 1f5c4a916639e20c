"""Columns that stand elsewhere in the tensors: prune_tokens(at=...) is scoring, then prune_scored; then error text."""

import pytest
import torch
from torch.library import opcheck

from helpers import slow
from vlmprune import ops
from vlmprune.ops.prune_tokens import checked

BACKENDS = ["reference", "triton"]


def problem(device, B=2, P=9, S=23, D=8, seed=0):
    """A tower's query and key of P patches behind a CLS row; where its patches stand among S rows; those rows; padding."""
    query, key, *_ = slow.inputs(device=device, seed=seed, B=B, S=P + 1, Sq=P + 1, D=D, N=P)
    g = torch.Generator().manual_seed(seed)
    at = torch.stack([torch.randperm(S - 2, generator=g)[:P].sort().values for _ in range(B)]).to(device)
    mask = torch.ones(B, S, dtype=torch.bool, device=device)
    mask[-1, :1] = False
    rows = torch.zeros(B, 1, dtype=torch.int64, device=device)
    columns = torch.arange(1, P + 1, device=device).expand(B, P).contiguous()
    tensors = [torch.randn(B, S, 10, generator=g).to(device), torch.randn(1, S, 6, generator=g).to(device)]
    scoring = dict(rows=rows, columns=columns, causal=False)
    return query, key, tensors, scoring, at, mask


def in_two(query, key, tensors, scoring, at, mask, **how):
    """The scores, and then what stays by them."""
    with ops.use_backend("reference"):
        scores = ops.received_attention(query, key, **scoring)
        return ops.prune_scored(scores, tensors, columns=at, key_mask=mask, **how)


def assert_same(out, want):
    assert all(map(torch.equal, out.tensors, want.tensors))
    for name in ("index", "count", "kept", "columns"):
        assert torch.equal(getattr(out, name), getattr(want, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        dict(keep=4),
        dict(keep=0),
        dict(keep=9, width=15, padding="left"),
        dict(keep=3, newest=True, most=5),
        dict(keep=torch.tensor([2, 5])),
        dict(keep=1, segments=torch.tensor([[4, 5], [9, 0]])),
        dict(keep=2, code=torch.tensor([[3, 0, 1, 2, 0, 0, 0, 0, 0]] * 2, dtype=torch.int8)),
    ],
    ids=lambda how: ",".join(how) + str(how["keep"])[:1],
)
def test_it_is_scoring_and_then_selecting(backend, masked, how, device):
    query, key, tensors, scoring, at, mask = problem(device)
    how = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in how.items()}
    mask = mask if masked else None
    want = in_two(query, key, tensors, scoring, at, mask, **how)
    with ops.use_backend(backend):
        out = ops.prune_tokens(query, key, tensors, at=at, at_mask=mask, **scoring, **how)
    assert_same(out, want)
    torch.testing.assert_close(out.scores, want.scores)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("S", [10, 12, 700])
def test_the_rows_may_be_fewer_or_more_than_the_patches_see(backend, S, device):
    """Positions of the tensors are none of the key's: neither how many there are, nor which are padding."""
    query, key, tensors, scoring, at, _ = problem(device, B=1, P=8, S=S)
    padding = torch.ones(1, 9, dtype=torch.bool, device=device)
    padding[0, 8] = False  # the last patch: its score is 0, and it competes
    scoring |= dict(key_mask=padding)
    with ops.use_backend(backend):
        out = ops.prune_tokens(query, key, tensors, at=at, keep=3, **scoring)
    assert_same(out, in_two(query, key, tensors, scoring, at, None, keep=3))
    assert out.index.shape[1] == S - 8 + 3 and out.scores[0, 7] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_that_stand_nowhere_do_not_compete(backend, device):
    query, key, tensors, scoring, at, _ = problem(device)
    at[1, 5:] = -1
    with ops.use_backend(backend):
        out = ops.prune_tokens(query, key, tensors, at=at, keep=7, **scoring)
    assert_same(out, in_two(query, key, tensors, scoring, at, None, keep=7))
    assert out.kept[1].tolist()[:5] == [0, 1, 2, 3, 4] and (out.kept[1, 5:] == -1).all()


def test_without_tensors_the_mask_says_how_many_there_are(device):
    query, key, _, scoring, at, mask = problem(device)
    for backend in BACKENDS:
        with ops.use_backend(backend):
            out = ops.prune_tokens(query, key, [], at=at, at_mask=mask, keep=4, **scoring)
        assert torch.equal(out.index, in_two(query, key, [], scoring, at, mask, keep=4, length=23).index)


def test_plans_take_it(device):
    """Their tensors are exchanged by name, like any other."""
    first, other = (problem(device, seed=seed) for seed in (0, 1))
    query, key, tensors, scoring, at, mask = first
    lists = {name: x for name, x in scoring.items() if isinstance(x, torch.Tensor)}
    with ops.use_backend("triton"):
        plan = ops.PrunePlan(query, key, tensors, at=at, at_mask=mask, keep=4, **scoring)
        for query, key, tensors, _, at, mask in (other, first, other):
            out = plan.run(query, key, tensors, at=at, at_mask=mask, **lists)
            want = ops.prune_tokens(query, key, tensors, at=at, at_mask=mask, keep=4, **scoring)
            assert_same(out, want)
            assert torch.equal(out.scores, want.scores)
    with pytest.raises(ValueError, match=r"^at: expected a tensor as in the plan, got None$"):
        plan.run(query, key, tensors, at_mask=mask, **lists)


def test_gradients_and_the_custom_op(device):
    query, key, tensors, scoring, at, mask = problem(device)
    tensors[0].requires_grad_()
    out = ops.prune_tokens(query, key, tensors, at=at, at_mask=mask, keep=4, **scoring)
    out.tensors[0].sum().backward()
    rows = torch.zeros(2, 23, device=device)
    for b, index in enumerate(out.index.tolist()):
        rows[b, [i for i in index if i >= 0]] = 1
    assert torch.equal(tensors[0].grad, rows[..., None].expand(-1, -1, 10))
    tensors[0].requires_grad_(False)
    lists, selection, s = checked(query, key, tensors, at=at, at_mask=mask, keep=4, **scoring)
    opcheck(torch.ops.vlmprune.prune_tokens.default, (lists, *selection, *s))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(at=None), r"^at: expected positions with at_mask, got None$"),
        (dict(at=torch.zeros(2, 8, dtype=torch.int64)), r"^at: expected .*\[2, 9\].*got \(2, 8\)$"),
        (dict(at=torch.zeros(2, 9)), r"^at: expected int64, got torch.float32$"),
        (dict(at=torch.zeros(2, 9, dtype=torch.int64)), r"^at: expected positions that ascend"),
        (dict(at=torch.arange(15, 24).expand(2, 9)), r"^at: expected positions in \[0, 23\) or -1, got 23$"),
        (dict(at_mask=torch.ones(2, 8, dtype=torch.bool)), r"^tensors\[0\]: expected 8 positions"),
        (dict(at_mask=torch.ones(2, 23)), r"^at_mask: expected bool, got torch.float32$"),
        (dict(tensors=[], at_mask=None), r"^tensors: expected one at least, or at_mask, got none$"),
        (dict(tensors=[torch.zeros(2, 8, 4)], at_mask=None), r"^at: expected at most 8 positions, got 9$"),
        (
            dict(cu_seqlens=torch.tensor([0, 10])),
            r"^query: expected a first dim of 1 with cu_seqlens",
        ),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x[:30],
)
def test_errors(change, message):
    query, key, tensors, scoring, at, mask = problem("cpu")
    call = dict(tensors=tensors, at=at, at_mask=mask, keep=4) | scoring | change
    with pytest.raises(ValueError, match=message):
        ops.prune_tokens(query, key, **call)


def test_not_with_a_packed_batch():
    query, key, tensors, scoring, at, _ = problem("cpu", B=1)
    with pytest.raises(ValueError, match=r"^at: expected None with cu_seqlens, got a tensor$"):
        ops.prune_tokens(query, key, tensors, at=at, keep=4, cu_seqlens=torch.tensor([0, 10]), **scoring)
