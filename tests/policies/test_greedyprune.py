"""GreedyPrune against its procedure in plain loops: the most salient token that is not too close to one that stays, again and again."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from helpers.contexts import kept_lists, named
from vlmprune.policies import GreedyPrune, Needs
from vlmprune.testing.context import make_context

NEEDS = Needs(hidden=True, text=True)
CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["square", "tall"], "after": [0, 5]}, id="one-without-text"),
    pytest.param({"images": ["two"], "after": [0]}, id="no-text"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 30, 34]]}, id="after-a-stage"),
]


def context(images, **settings):
    return make_context(NEEDS, named(images), 2, **settings)


def cosine(a, b):
    """In plain sums; that to a vector of no direction is 0."""
    size = float((a * a).sum() * (b * b).sum()) ** 0.5
    return round(float((a * b).sum()) / size, 6) if size > 0 else 0.0


def salience(ctx, sample):
    """Of every token, its cosine to the last text token: 0 without one."""
    words = [i for i, place in enumerate(ctx.text[sample].tolist()) if place >= 0]
    tokens = ctx.hidden[sample, : ctx.counts[sample]].double()
    if not words:
        return tokens, [0.0] * len(tokens)
    last = ctx.text_hidden[sample, words[-1]].double()
    return tokens, [cosine(token, last) for token in tokens]


def slow(ctx, sample, count, tau):
    """One token after another; then the most salient of those left out."""
    tokens, weight = salience(ctx, sample)
    order = sorted(range(len(tokens)), key=lambda j: (-weight[j], j))
    chosen = []
    for j in order:
        if len(chosen) < count and all(cosine(tokens[j], tokens[i]) <= tau for i in chosen):
            chosen.append(j)
    left_out = [j for j in order if j not in chosen]
    return sorted([*chosen, *left_out[: count - len(chosen)]])


def count_of(keep, tokens, images):
    return min(tokens, keep * images if isinstance(keep, int) else max(1, int(keep * tokens + 1e-6)))


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("keep, tau", [(0.5, 0.9), (0.3, 0.2), (5, -0.1), (0.7, -1.0), (0.4, 1.0)])
def test_equals_the_procedure(settings, keep, tau):
    ctx = context(**settings)
    got = kept_lists(GreedyPrune(keep=keep, tau=tau).select(ctx))
    for sample, n in enumerate(ctx.counts):
        assert got[sample] == slow(ctx, sample, count_of(keep, n, len(ctx.grids[sample])), tau)


@pytest.mark.parametrize("keep", [3, 6, 20])
def test_doubles_come_last(keep):
    """24 tokens along 6 axes, of several lengths: cosines are exactly 0 or 1, and saliencies tie."""
    ctx = context([((4, 6),)])
    axis = torch.randint(6, (24,), generator=torch.Generator().manual_seed(3))
    hidden = (torch.eye(8)[axis] * (1 + torch.arange(24)[:, None] % 3))[None]
    words = torch.zeros_like(ctx.text_hidden)
    words[:, -1, :6] = torch.tensor([3.0, 1, 2, 2, 0, 5])
    ctx = replace(ctx, hidden=hidden, text_hidden=words)
    kept = kept_lists(GreedyPrune(keep=keep).select(ctx))[0]
    assert kept == slow(ctx, 0, keep, 0.9)
    assert len({int(axis[i]) for i in kept}) == min(keep, len(set(axis.tolist())))


def test_what_stays_is_apart_where_it_can_be_and_salience_alone_decides_at_1():
    ctx = context(["square"])
    tokens, weight = salience(ctx, 0)
    apart = kept_lists(GreedyPrune(keep=6, tau=0.3).select(ctx))[0]
    assert all(cosine(tokens[i], tokens[j]) <= 0.3 for i, j in combinations(apart, 2))
    best = sorted(sorted(range(36), key=lambda j: -weight[j])[:6])
    assert kept_lists(GreedyPrune(keep=6, tau=1.0).select(ctx))[0] == best != apart


def test_only_the_last_word_counts():
    ctx = context(["square"])
    policy, other = GreedyPrune(keep=6), ctx.text_hidden.flip(1)
    first = torch.cat([other[:, :-1], ctx.text_hidden[:, -1:]], 1)
    want = policy.select(ctx)
    assert torch.equal(policy.select(replace(ctx, text_hidden=first)), want)
    assert not torch.equal(policy.select(replace(ctx, text_hidden=other)), want)


def test_by_image_a_choice_is_that_of_each_image_alone():
    ctx = context([((4, 5), (5, 4))])
    for spend in ("image", "crop"):
        got = GreedyPrune(keep=4, tau=0.2, spend=spend).select(ctx)[0].tolist()
        want = []
        for first in (0, 20):
            part = replace(ctx, hidden=ctx.hidden[:, first : first + 20], counts=(20,))
            want += [first + j for j in slow(part, 0, 4, 0.2)]
        assert got == want
    together = GreedyPrune(keep=4, tau=0.2).select(ctx)[0].tolist()
    assert together == slow(ctx, 0, 8, 0.2) != want


def test_needs_and_counts():
    assert GreedyPrune().needs(2) == NEEDS and GreedyPrune(layer=0).layers == (0,)
    assert GreedyPrune(keep=30).kept(1152, 2, 2) == 60


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layer": -1}, r"^layer: expected a whole number >= 0, got -1$"),
        ({"keep": 0}, r"^keep: expected a share in \(0, 1\] or .*, got 0$"),
        ({"tau": 1.5}, r"^tau: expected a cosine in \[-1, 1\], got 1\.5$"),
        ({"tau": float("nan")}, r"^tau: expected a cosine in \[-1, 1\], got nan$"),
        ({"tau": "0.9"}, r"^tau: expected a cosine in \[-1, 1\], got '0\.9'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        GreedyPrune(**settings)


@pytest.mark.parametrize("name", ["hidden", "text", "text_hidden"])
def test_missing_inputs(name):
    with pytest.raises(
        ValueError, match=rf"^ctx\.{name}: expected .* \(declare Needs\(.*=True\)\), got None$"
    ):
        GreedyPrune().select(replace(context(["square"]), **{name: None}))
