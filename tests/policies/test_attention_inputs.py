"""What ``AttentionInputs.received`` passes to the op, and how it joins heads that lie on several ranks."""

from dataclasses import replace

import pytest
import torch

from helpers.contexts import case
from vlmprune import ops
from vlmprune.policies import inputs


def halves(seen):
    """The same layer on two ranks: each with half of the heads."""
    h, k = seen.query.shape[1] // 2, seen.key.shape[1] // 2
    first = replace(seen, query=seen.query[:, :h], key=seen.key[:, :k])
    return first, replace(seen, query=seen.query[:, h:], key=seen.key[:, k:])


def two_ranks(monkeypatch, others):
    """A group of two whose other rank has ``others``."""

    class Group:
        def size(self):
            return 2

    group = Group()

    def all_reduce(x, op, group):
        join = torch.maximum if op == inputs.dist.ReduceOp.MAX else torch.add
        x.copy_(join(x, others()))

    def all_gather(parts, x, group):
        parts[0].copy_(x)
        parts[1].copy_(others())

    monkeypatch.setattr(inputs.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(inputs.dist, "all_gather", all_gather)
    return group


@pytest.mark.parametrize("head_reduce", ["mean", "sum", "max", "none"])
def test_heads_of_two_ranks_give_what_all_heads_give(monkeypatch, head_reduce):
    seen = case(["two", "tall"]).ctx.attention
    want = seen.received(head_reduce=head_reduce)
    mine, others = halves(seen)
    group = two_ranks(monkeypatch, lambda: others.received(head_reduce=head_reduce))
    got = replace(mine, group=group).received(head_reduce=head_reduce)
    assert not torch.allclose(mine.received(head_reduce=head_reduce).mean(1), want.mean(1))
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("head_reduce", ["mean", "sum", "max"])
def test_the_best_heads_are_those_of_both_ranks(monkeypatch, head_reduce):
    seen = case(["two", "tall"]).ctx.attention
    mine, others = halves(seen)
    group = two_ranks(monkeypatch, lambda: others.received(head_reduce="none"))
    weight = torch.rand(*seen.rows.shape, seen.columns.shape[1])
    for top in range(1, seen.query.shape[1] + 2):
        how = dict(head_reduce=head_reduce, top_heads=top)
        got = replace(mine, group=group).received(**how)
        torch.testing.assert_close(got, seen.received(**how), atol=1e-7, rtol=1e-6)
    others_weighted = others.received(pair_weight=weight, head_reduce="none")
    group = two_ranks(monkeypatch, lambda: others_weighted)
    got = replace(mine, group=group).received(pair_weight=weight, top_heads=1)
    torch.testing.assert_close(got, seen.received(pair_weight=weight, top_heads=1), atol=1e-7, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^top_heads: expected a whole number >= 1, got 0$"):
        replace(mine, group=group).received(top_heads=0)


def test_real_collectives_of_one_rank_change_nothing():
    seen = case(["square"]).ctx.attention
    dist = inputs.dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for head_reduce in ("mean", "sum", "max", "none"):
            want = seen.received(head_reduce=head_reduce)
            assert torch.equal(replace(seen, group=dist.group.WORLD).received(head_reduce=head_reduce), want)
    finally:
        dist.destroy_process_group()


def test_lse_counts_for_rotated_row_shares_only():
    seen = case(["square"]).ctx.attention
    lse = ops.row_lse(seen.query, seen.key, seen.rows, key_mask=seen.key_mask, scale=seen.scale)
    given = replace(seen, lse=lse)
    torch.testing.assert_close(given.received(), seen.received(), atol=1e-7, rtol=1e-6)
    wrong = replace(seen, lse=lse + 1)
    torch.testing.assert_close(wrong.received(), seen.received() / torch.e, atol=1e-7, rtol=1e-5)
    for more in ({"normalize": "columns"}, {"normalize": "columns", "unrotated": True}, {"unrotated": True}):
        assert torch.equal(wrong.received(**more), seen.received(**more))


def test_a_chunk_without_its_past_has_no_lse():
    seen = case(["two", "tall", "two"], past=True).ctx.attention
    lse = torch.zeros(seen.query.shape[:3])
    assert replace(seen, lse=lse).chunk().lse is None
    assert replace(seen, lse=lse, group="ranks").chunk().group == "ranks"
