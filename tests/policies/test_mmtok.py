"""MMTok against its formula, row by row."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.contexts import images_in, kept_lists, sight
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.mmtok import MMTok
from vlmprune.testing.context import make_case, with_text
from vlmprune.testing.context_changes import first_alone

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="few-values"),
    pytest.param({"images": [((5, 5),)], "cls": False}, id="no-cls"),
]


def count_of(keep, tokens):
    return min(tokens, keep) if isinstance(keep, int) else max(1, int(keep * tokens))


def unit(x):
    return [(row / row.norm()).tolist() for row in x.double().cpu()]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits):
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e]


def slow(features, hidden, text, keep, alpha=0.5, tv=0.02, vv=0.2):
    """Sums over lists, in double precision."""
    v, x, t = unit(features), unit(hidden), unit(text)
    n = len(v)
    rows = [[p / len(t) for p in softmax([dot(a, b) / tv for b in x])] for a in t]
    rows += [[alpha * q / n for q in softmax([dot(a, b) / vv for b in v])] for a in v]
    covered, kept = [0.0] * len(rows), []
    for _ in range(keep):
        worth = {
            j: sum(max(0.0, row[j] - c) for row, c in zip(rows, covered, strict=True))
            for j in range(n)
            if j not in kept
        }
        best = max(worth, key=lambda j: (round(worth[j], 12), -j))
        kept.append(best)
        covered = [max(c, row[best]) for row, c in zip(rows, covered, strict=True)]
    return sorted(kept)


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize(
    "keep, how",
    [
        (6, {}),
        (0.3, {"alpha": 2, "text_temperature": 0.1}),
        (1, {"vision_temperature": 1.0}),
        (1.0, {}),
    ],
)
def test_equals_the_formula(settings, keep, how):
    ctx = sight(**settings)
    got = MMTok(keep, positions="pack", **how).select(ctx)
    names = {"text_temperature": "tv", "vision_temperature": "vv"}
    slowly = {names.get(name, name): value for name, value in how.items()}
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        text = ctx.embeds[sample, [t for t in ctx.text[sample].tolist() if t >= 0]]
        for number, first, (r, c) in here:
            hidden = ctx.hidden[sample, first : first + r * c]
            chosen = slow(ctx.features[number], hidden, text, count_of(keep, r * c), **slowly)
            expected += [first + j for j in chosen]
        assert kept_lists(got.index)[sample] == expected


def test_without_text_the_image_alone_is_covered():
    ctx = sight(["square"])
    none = replace(ctx, text=torch.full_like(ctx.text, -1))
    empty = replace(ctx, text=ctx.text[:, :0])
    expected = slow(ctx.features[0], ctx.hidden[0], ctx.hidden[0, :0], 6)
    for changed in (none, empty):
        assert MMTok(6).select(changed).tolist() == [expected]


def test_alone_the_text_is_covered():
    """With alpha = 0, a token for each text token it is like, and then the first ones."""
    ctx = sight([((3, 4),)])
    at = ctx.text[0, :2]
    embeds = ctx.embeds.clone()
    embeds[0, at] = ctx.hidden[0, [7, 9]]
    got = MMTok(3, alpha=0, text_temperature=1e-3).select(replace(ctx, embeds=embeds, text=at[None]))
    assert got.tolist() == [[0, 7, 9]]


def test_duplicates():
    """Once a direction is covered, another one comes first."""
    ctx = sight([((2, 3),)])
    axes = torch.zeros_like(ctx.features)
    axes[0, range(6), [0, 0, 1, 1, 2, 2]] = 1.0
    same = replace(ctx, features=axes, text=ctx.text[:, :0])
    assert MMTok(3, vision_temperature=0.02).select(same).tolist() == [[0, 2, 4]]


def test_images_may_be_chosen_from_as_one():
    ctx = sight([((4, 5), (5, 4))])
    text = ctx.embeds[0, ctx.text[0]]
    expected = slow(torch.cat([*ctx.features]), ctx.hidden[0], text, 8)
    assert MMTok(4, spend="prompt").select(ctx).tolist() == [expected]


def test_no_images():
    assert MMTok().select(sight(["none"])).shape == (1, 0)


def test_needs():
    assert MMTok().layers == (0,)
    assert MMTok().needs(0) == Needs(hidden=True, embeds=True, vision=(-2,))
    for name in ("features", "hidden", "embeds", "text"):
        with pytest.raises(ValueError, match=rf"^ctx\.{name}: expected .* \(declare .*\), got None$"):
            MMTok().select(replace(sight(["square"]), **{name: None}))


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"alpha": -1}, "alpha: expected a number >= 0, got -1"),
        ({"alpha": float("inf")}, "alpha: expected a number >= 0, got inf"),
        ({"text_temperature": 0}, "text_temperature: expected a number > 0, got 0"),
        ({"vision_temperature": "hot"}, "vision_temperature: expected a number > 0, got 'hot'"),
    ],
)
def test_rejects(settings, error):
    with pytest.raises(ValueError) as caught:
        MMTok(**settings)
    assert str(caught.value) == error


def test_a_larger_neighbour_with_more_text_changes_nothing():
    """Its crop makes padding of ours, and its text makes rows that are no words of ours."""
    policy = MMTok(keep=4, text_temperature=0.2, vision_temperature=0.2)
    changed = 0
    for seed in range(20):
        made = with_text(make_case([((3, 3),), ((4, 4),)], 0, after=[2, 20], seed=seed), seed=seed + 1)
        ctx = with_features(made, seed)
        both = kept_lists(policy.select(ctx))
        alone = kept_lists(policy.select(replace(first_alone(ctx), features=ctx.features[:1, :9])))
        changed += both[0] != alone[0]
    assert changed == 0


def with_features(made, seed):
    """One crop an image, of nine and of sixteen patches."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 16, 12, generator=g)
    features[0, 9:] = 0
    return replace(made.ctx, features=features, project=lambda x: x, attention=None)
