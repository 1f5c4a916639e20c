"""received_attention where it is easy to get wrong: many heads, NaN, -inf, positions out of range."""

import pytest
import torch

from helpers import slow
from vlmprune import ops
from vlmprune.ops.scoring import Scoring

HEADS, ROWS = ("mean", "max", "sum", "none"), ("mean", "max", "sum")


def run(backend, query, key, **kwargs):
    with ops.use_backend(backend):
        return ops.received_attention(query, key, **kwargs)


@pytest.mark.parametrize("head_reduce", HEADS)
def test_more_heads_than_are_joined_at_once(head_reduce, device):
    query, key, rows, columns = slow.inputs(H=22, Hkv=11, device=device)
    kwargs = dict(rows=rows, columns=columns, head_reduce=head_reduce)
    out, expected = run("triton", query, key, **kwargs), run("reference", query, key, **kwargs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("head_reduce", HEADS)
@pytest.mark.parametrize("row_reduce", ROWS)
def test_nan_stays_where_it_arises(backend, head_reduce, row_reduce, device):
    query, key, rows, columns = slow.inputs(B=1, device=device)
    kwargs = dict(rows=rows, columns=columns, causal=False, head_reduce=head_reduce, row_reduce=row_reduce)
    clean = run(backend, query, key, normalize="none", **kwargs)
    key[0, 1, columns[0, 3], 5] = float("nan")  # one key of one KV head, which two of four heads read
    out = run(backend, query, key, normalize="none", **kwargs)
    where = torch.zeros_like(clean, dtype=torch.bool)
    where[..., 3] = True
    if head_reduce == "none":
        where[:, :2] = False
    assert out[where].isnan().all() and torch.equal(out[~where], clean[~where])
    assert run(backend, query, key, normalize="row", **kwargs)[..., -1].isnan().any()  # by its denominator


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_visible_minus_infinity_is_not_an_unseen_column(backend, device):
    query = torch.ones(1, 1, 4, 16, dtype=torch.float16, device=device)
    key = torch.ones(1, 1, 4, 16, dtype=torch.float16, device=device)
    key[0, 0, 1, 0] = float("-inf")
    rows, columns = torch.tensor([[2]], device=device), torch.arange(4, device=device)[None]
    kwargs = dict(rows=rows, columns=columns, row_reduce="max", scale=1.0)
    logits = run(backend, query, key, normalize="none", **kwargs)
    assert logits.tolist() == [[16.0, float("-inf"), 16.0, 0.0]]
    attention = run(backend, query, key, **kwargs)
    torch.testing.assert_close(attention.cpu(), torch.tensor([[0.5, 0.0, 0.5, 0.0]]))


def test_positions_out_of_range_are_padding_to_the_kernel(device):
    """On the CPU they are refused (below); a GPU cannot look without waiting, so its kernel must not read there."""
    from vlmprune.triton_kernels.received_attention import received_attention

    query, key, rows, columns = slow.inputs(device=device)
    strange, plain = (rows.clone(), columns.clone()), (rows.clone(), columns.clone())
    for lists, row, column in ((strange, 7, 21), (strange, 21, 10**12), (plain, -1, -1)):
        lists[0][:, 0], lists[1][:, 2] = row, column
        padded = (torch.where(x == y, x, -1) for x, y in zip(lists, (rows, columns), strict=True))
        out, expected = (
            received_attention(Scoring.checked(query, key, rows=r, columns=c, scale=0.2))
            for r, c in (lists, padded)
        )
        assert torch.equal(out, expected) and out[:, 2].eq(0).all()
