"""prune_tokens of more columns than one program can select at once."""

import pytest
import torch
from torch.utils._pytree import tree_map

from helpers import slow
from vlmprune import ops


def run(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return ops.prune_tokens(*args, **kwargs)


@pytest.mark.parametrize("S, N", [(2500, 300), (4400, 4200)])
def test_longer_than_a_chunk(S, N, device):
    """The last program marks and selects in pieces."""
    shape = dict(B=1, H=1, Hkv=1, Sq=1, S=S, D=8, R=1, N=N)
    query, key, rows, columns = slow.inputs(device=device, **shape)
    call = dict(rows=rows, columns=columns, keep=70)
    out, expected = (run(backend, query, key, [key], **call) for backend in ("triton", "reference"))
    assert torch.equal(out.index, expected.index) and torch.equal(out.count, expected.count)


@pytest.mark.parametrize(
    "heads, R, B, top, parts",
    [((4, 2), 33, 2, 3, False), ((7, 1), 3, 1, 6, True)],
)
def test_many_columns_in_every_way(heads, R, B, top, parts, device):
    """Half precision: programs of 16 warps. They select by their scores, which are those of the reference."""
    S, N, g = 4300, 4160, torch.Generator().manual_seed(R)
    query, key = (torch.randn(B, h, S, 16, generator=g).half() for h in heads)
    places = torch.stack([torch.randperm(S - 60, generator=g)[:N].sort().values for _ in range(B)])
    lists = dict(columns=places, key_mask=torch.rand(B, S, generator=g) < 0.9)
    how = dict(
        keep=100, newest=True, padding="left", code=torch.randint(0, 4, (B, N), generator=g).to(torch.int8)
    )
    if parts:
        how |= dict(keep=torch.tensor([[10, 30, 20]] * B), segments=torch.tensor([[1000, 2160, 1000]] * B))
    rating = dict(
        rows=torch.arange(S - R, S).repeat(B, 1), top_heads=top, pair_weight=torch.rand(B, R, N, generator=g)
    )
    given = (query, key, lists, how, rating)
    query, key, lists, how, rating = tree_map(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, given
    )
    out = run("triton", query[:, :, -50:], key, [key], **lists, **how, **rating)
    with ops.use_backend("reference"):
        scores = ops.received_attention(query[:, :, -50:], key, **lists, **rating)
        same = ops.prune_scored(out.scores, [key], **lists, **how)
    torch.testing.assert_close(out.scores, scores, rtol=1e-4, atol=1e-6 * scores.max().item())
    assert all(map(torch.equal, (out.index, out.kept, out.count), (same.index, same.kept, same.count)))
