"""Methods that act twice: what a subclass of one overrides counts, and nothing is asked where there is no image."""

import pytest
import torch

from helpers.contexts import case, sight
from vlmprune.policies.methods.flashvid import FlashVID
from vlmprune.policies.methods.holitom import HoliTom
from vlmprune.policies.methods.prunevid import PruneVid
from vlmprune.policies.methods.star import STAR
from vlmprune.policies.methods.vscan import VScan

TWICE = [FlashVID, HoliTom, PruneVid, STAR, VScan]


@pytest.mark.parametrize("kind", TWICE)
def test_layers_budgets_and_spending(kind):
    policy = kind(layer=3, then=0.5).at(0.25)
    assert policy.layers == (0, 3) and (policy.keep, policy.then) == (0.25, 0.25)
    assert policy.spends(0) in ("crop", "image") and policy.spends(3) == "prompt"
    assert [policy.kept(100, 1, layer) for layer in (0, 3)] == [25, 25]
    assert [policy.ranks(layer) for layer in (0, 3)] == [kind is STAR, kind in (FlashVID, STAR, VScan)]


@pytest.mark.parametrize("kind", [FlashVID, VScan])
def test_a_subclass_that_selects_ranks_no_longer(kind):
    class First(kind):
        def select(self, ctx):
            return torch.where(ctx.ordinals == 0, ctx.ordinals, -1)[:, :1]

    assert not First(layer=3).ranks(3) and not First(layer=3).ranks(0)

    class Second(kind):
        def second(self, ctx):
            return ctx.ordinals

    made = case(["tall", "square"], layer=3, last_only=True)
    assert not Second(layer=3).ranks(3)
    assert torch.equal(Second(layer=3).select(made.ctx), made.ctx.ordinals)


@pytest.mark.parametrize("kind", TWICE)
def test_without_images(kind):
    got = kind().select(sight(["none", "none"], layers=(-1, -2, 5)))
    assert (got if torch.is_tensor(got) else got.index).shape == (2, 0)
