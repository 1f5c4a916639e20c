"""Intersection keeps what both keep, and the first policy's choice where that is nothing."""

import pytest
import torch

from helpers.contexts import case, kept_lists
from vlmprune.policies import Custom, FastV, Random, Uniform
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.compose import Intersection
from vlmprune.policies.methods.pyramiddrop import PyramidDrop


@pytest.mark.parametrize("images", [["square"], ["two", "none", "tall"], ["none"]])
def test_intersection_of_sets(images):
    ctx = case(images).ctx
    p, q, r = FastV(keep=0.8), Uniform(keep=0.7), Random(keep=0.9)
    parts = [kept_lists(x.select(ctx)) for x in (p, q, r)]
    expected = [sorted(set(samples[0]).intersection(*samples[1:])) for samples in zip(*parts, strict=True)]
    index = (p & q & r).select(ctx)
    assert all(expected[b] for b, n in enumerate(ctx.counts) if n)  # the rule for empty ones is tested below
    assert kept_lists(index) == expected
    assert index.shape[1] == max(map(len, expected))


def keep(*numbers):
    """A policy that keeps the same numbers of every sample."""
    return Custom(2, lambda ctx: torch.tensor([numbers] * len(ctx.counts)))


def test_nothing_in_common_keeps_the_first_choice():
    ctx = case(["square", "tall"]).ctx
    assert (keep(1, 4) & keep(2, 3)).select(ctx).tolist() == [[1, 4]] * 2
    assert (keep(1, 4) & keep(2, 4)).select(ctx).tolist() == [[4]] * 2
    assert (keep(1, 4) & Intersection(keep(2, 3), keep(4, 5))).select(ctx).tolist() == [[1, 4]] * 2


def test_the_rule_is_per_sample():
    ctx = case(["square", "tall"]).ctx
    other = Custom(2, lambda ctx: torch.tensor([[0, 5], [7, 8]]))
    assert kept_lists((keep(0, 9) & other).select(ctx)) == [[0], [0, 9]]


def test_with_a_union():
    ctx = case(["square"]).ctx
    assert kept_lists(((keep(1, 4) | keep(2, 3)) & keep(3, 4, 5)).select(ctx)) == [[3, 4]]


def test_needs_what_both_need():
    p, q = FastV(rows="mean"), Custom(2, lambda ctx: ctx.ordinals)
    assert (p & q).needs(2) == Needs(hidden=True, attention="previous", rows="all")


def test_rejects():
    with pytest.raises(ValueError, match=r"^second: expected a policy with the layers \(2,\), got \(3,\)$"):
        FastV(layer=2) & Random(layer=3)
    with pytest.raises(ValueError, match=r"^second: expected a policy, got 3$"):
        Intersection(FastV(), 3)
    packs = PyramidDrop(layers=(2,), positions="pack")
    assert isinstance(packs.select(case(["square"]).ctx), Reduction)
    with pytest.raises(
        ValueError, match=r"^intersection: expected policies that only drop tokens, got PyramidDrop\("
    ):
        (FastV() & packs).select(case(["square"]).ctx)
