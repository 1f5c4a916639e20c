"""Stages delegates by layer; Union keeps what either keeps."""

import pytest
import torch

from helpers.contexts import case, kept_lists
from vlmprune.policies import Custom, FastV, Feather, Needs, Random, Stages, Uniform, Union


def test_stages_delegates_by_layer():
    fastv, random = FastV(layer=2), Random(layer=5, keep=3)
    both = Stages([random, fastv])
    assert both.layers == (2, 5)
    assert (both.needs(2), both.needs(5)) == (fastv.needs(2), random.needs(5))
    for layer, policy in ((2, fastv), (5, random)):
        ctx = case(["two", "square"], layer=layer).ctx
        assert torch.equal(both.select(ctx), policy.select(ctx))


def test_stages_in_any_order_are_equal_and_may_interleave():
    a, b = Feather(layers=(2, 6)), Random(layer=4)
    assert Stages([a, b]) == Stages((b, a))
    assert Stages([a, b]).layers == (2, 4, 6)
    assert Stages([Stages([b]), a]).layers == (2, 4, 6)


@pytest.mark.parametrize(
    "policies, message",
    [
        ([], r"^policies: expected at least one policy, got none$"),
        (FastV(), r"^policies: expected a list of policies, got FastV\("),
        ([FastV(), 3], r"^policies: expected policies only, got 3$"),
        (
            [FastV(layer=2), Random(layer=2)],
            r"^policies: expected one policy per layer, got FastV\(.*\) and Random\(.*\) at layer 2$",
        ),
    ],
)
def test_stages_rejects(policies, message):
    with pytest.raises(ValueError, match=message):
        Stages(policies)


def test_stages_rejects_other_layers():
    with pytest.raises(ValueError, match=r"^layer: expected one of \(2,\), got 3$"):
        Stages([FastV(layer=2)]).select(case(["square"], layer=3).ctx)


@pytest.mark.parametrize("images", [["square"], ["two", "none", "tall"]])
def test_union_of_sets(images):
    ctx = case(images).ctx
    p, q, r = FastV(keep=0.3), Uniform(keep=4), Random(keep=1)
    parts = [kept_lists(x.select(ctx)) for x in (p, q, r)]
    expected = [sorted(set().union(*samples)) for samples in zip(*parts, strict=True)]
    index = (p | q | r).select(ctx)
    assert kept_lists(index) == expected
    assert index.shape[1] == max(map(len, expected))


def test_feather_is_a_union():
    """Stage 1 of FEATHER = its own top-k joined with the grid."""
    ctx = case(["two", "tall"], layer=2).ctx
    whole = Feather(layers=(2, 5), keep=0.3, stride=3)
    bare = Feather(layers=(2, 5), keep=0.3, stride=1000)
    assert torch.equal(
        whole.select(ctx), (bare | Stages([Uniform(layer=2, stride=3), Random(layer=5)])).select(ctx)
    )


def test_union_needs_what_both_need():
    p, q = FastV(rows="mean"), Custom(2, lambda ctx: ctx.ordinals)
    assert (p | q).needs(2) == Needs(hidden=True, attention="previous", rows="all")
    assert (Random() | Uniform()).needs(2) == Needs()
    assert (Random() | FastV()).needs(2) == FastV().needs(2)


def test_union_rejects():
    with pytest.raises(ValueError, match=r"^second: expected a policy with the layers \(2,\), got \(3,\)$"):
        FastV(layer=2) | Random(layer=3)
    with pytest.raises(ValueError, match=r"^second: expected a policy, got 3$"):
        Union(FastV(), 3)
