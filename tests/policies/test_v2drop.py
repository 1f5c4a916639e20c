"""V2Drop against its formula: how far the layer before has moved a token, token by token in double precision."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.contexts import kept_lists, named, top
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.v2drop import V2Drop
from vlmprune.policies.schedule import stage_counts
from vlmprune.testing.context import make_context

NEEDS = Needs(hidden=True, earlier=True)


def slow(ctx, sample):
    """Distances of one sample's tokens, summed one by one."""
    rows = zip(ctx.hidden[sample].tolist(), ctx.earlier[sample].tolist(), strict=True)
    moved = [math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(*pair, strict=True))) for pair in rows]
    return [round(x, 5) for x in moved[: ctx.counts[sample]]]


def made(images, layer=3, **settings):
    return make_context(NEEDS, named(images), layer, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"images": ["square"]}, id="one-image"),
        pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
        pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 22, 30, 34]]}, id="after-a-stage"),
        pytest.param({"images": [((1, 1),)]}, id="one-token"),
    ],
)
@pytest.mark.parametrize("keep", [0.5, 0.3, 1.0, 1, 5, 100])
def test_equals_the_formula(settings, keep):
    ctx = made(**settings)
    got = kept_lists(V2Drop(layers=(3,), keep=(keep,)).select(ctx))
    for sample, (n, images) in enumerate(zip(ctx.counts, ctx.images(), strict=True)):
        count = min(n, keep * len(images)) if isinstance(keep, int) else min(n, max(1, int(n * keep)))
        assert got[sample] == top(slow(ctx, sample), count)


def test_ties_go_to_the_earlier_token():
    """Of tokens that a layer has moved as far, in whatever direction."""
    ctx = made(["square", "tall"])
    step = torch.zeros_like(ctx.hidden)
    step[:, ::3, 0], step[:, 1::3, 1], step[:, 2::3, 2] = 2.0, -2.0, 1.0
    same = replace(ctx, earlier=torch.zeros_like(ctx.hidden), hidden=step * ctx.mask[..., None])
    got = kept_lists(V2Drop(layers=(3,), keep=(7,)).select(same))
    assert got == [[0, 1, 3, 4, 6, 7, 9]] * 2


def test_a_token_that_rests_goes_first():
    ctx = made(["square"])
    earlier = ctx.earlier.clone()
    earlier[0, 4] = ctx.hidden[0, 4]
    kept = V2Drop(layers=(3,), keep=(35,)).select(replace(ctx, earlier=earlier))
    assert kept.tolist() == [[j for j in range(36) if j != 4]]


def test_released_schedule():
    """A half at layers 3 and 17, one token at 22; the mean over 32 layers is what the docstring says."""
    assert stage_counts(V2Drop(), 576) == [(3, 288), (17, 144), (22, 1)]
    assert round((3 * 576 + 14 * 288 + 5 * 144 + 10) / 32) == 203


def test_a_share_is_that_of_every_stage():
    assert V2Drop().at(0.25).keep == (0.25, 0.25, 0.25)
    assert V2Drop(layers=[2], keep=[3]) == V2Drop(layers=(2,), keep=(3,))
    assert V2Drop().needs(17) == NEEDS


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"layers": (0, 2, 3)},
            r"^layer: expected a whole number >= 1 \(a token's way through the layer before is its score\), got 0$",
        ),
        ({"keep": 0.5}, r"^keep: expected 3 shares or counts, one per layer, got 0\.5$"),
        ({"keep": (0.5, 0.5)}, r"^keep: expected 3 shares or counts, one per layer, got \(0\.5, 0\.5\)$"),
        (
            {"keep": (0.5, 0.5, 0)},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        V2Drop(**settings)


@pytest.mark.parametrize("name", ["hidden", "earlier"])
def test_missing_states(name):
    ctx = replace(made(["square"]), **{name: None})
    with pytest.raises(ValueError, match=rf"^ctx\.{name}: expected .*Needs\({name}=True\)\), got None$"):
        V2Drop().select(ctx)
