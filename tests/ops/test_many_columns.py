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
    """Selected in pieces, by the last program or in a launch of its own."""
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
    """They select by their scores, which are those of the reference."""
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
    assert_selects_by_its_scores(query[:, :, -50:], key, lists, how, rating)


@pytest.mark.parametrize(
    "how, masked", [({}, False), (dict(newest=True), True), (dict(width=900, most=50), True)], ids=str
)
def test_several_programs_select_from_one_sample(how, masked, device):
    """Each numbers its own columns and positions; one sample has fewer columns than programs."""
    B, S, N, g = 2, 6500, 6000, torch.Generator().manual_seed(5)
    query, key = (torch.randn(B, h, S, 16, generator=g) for h in (2, 1))
    places = torch.stack([torch.randperm(S, generator=g)[:N].sort().values for _ in range(B)])
    places[1, 1500:] = -1
    places[0, -1] = S - 1
    lists = dict(columns=places.to(device))
    if masked:
        lists["key_mask"] = (torch.rand(B, S, generator=g) < 0.9).to(device)
    rows = torch.tensor([[S - 1], [S - 2]], device=device)
    query, key = query[:, :, -50:].to(device), key.to(device)
    assert_selects_by_its_scores(query, key, lists, how | dict(keep=700), dict(rows=rows))


@pytest.mark.parametrize("N", [17_000, 33_000])
def test_more_columns_than_registers_hold(N, device):
    """Or almost: the widest kernel that holds them, and the one that reads them anew."""
    g = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 5000, (1, N), generator=g).float().to(device)
    with ops.use_backend("triton"):
        out = ops.prune_scored(scores, [scores], keep=9000)
    with ops.use_backend("reference"):
        want = ops.prune_scored(scores, [scores], keep=9000)
    assert torch.equal(out.index, want.index) and torch.equal(out.columns, want.columns)


def assert_selects_by_its_scores(query, key, lists, how, rating):
    out = run("triton", query, key, [key], **lists, **how, **rating)
    with ops.use_backend("reference"):
        scores = ops.received_attention(query, key, **lists, **rating)
        same = ops.prune_scored(out.scores, [key], **lists, **how)
    torch.testing.assert_close(out.scores, scores, rtol=1e-4, atol=1e-6 * scores.max().item())
    for name in ("index", "kept", "count", "columns"):
        assert torch.equal(getattr(out, name), getattr(same, name)), name
