"""TRIM against loops over tokens in double precision, by number and by outliers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import images_in, sight
from helpers.folds import cosine, projected_sight
from vlmprune.policies import TRIM
from vlmprune.policies.base import Needs
from vlmprune.policies.counts import keep_count

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
    pytest.param({"images": ["square"], "few_values": True}, id="few values"),
]


def likeness_to_text(ctx, sample, j):
    """Mean cosine of a visual token with the text behind the last image."""
    row = ctx.hidden[sample, j].double().cpu().numpy()
    text = [t for t in ctx.text[sample].tolist() if t >= 0]
    words = ctx.embeds[sample, text].double().cpu().numpy()
    return round(sum(cosine(row, word) for word in words) / max(len(words), 1), 7)


def chosen_slowly(score, kept, adaptive=False, scale=100.0):
    """The places that stay besides the mean, ascending."""
    order = sorted(range(len(score)), key=lambda j: (-score[j], j))
    if not adaptive:
        return sorted(order[: kept - (1 < kept < len(score))])
    share = np.exp(scale * np.array(score))
    share /= share.sum()
    low, high = np.percentile(share, [25, 75])
    count = max(1, sum(x > high + 1.5 * (high - low) for x in share))
    return sorted(order[: min(count, kept - (kept > 1))])


def assert_trimmed(policy, ctx, score_of=likeness_to_text):
    got = policy.select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        places, rows, into = [], [], {}
        for image, first, (height, width) in here:
            n = height * width
            score = [score_of(ctx, sample, first + j) for j in range(n)]
            kept = keep_count(policy.keep, n)
            stay = chosen_slowly(score, kept, policy.adaptive, policy.scale)
            places += [first + j for j in stay]
            rows += [ctx.hidden[sample, first + j] for j in stay]
            gone = [j for j in range(n) if j not in stay]
            if kept > 1 and gone:
                places.append(first + gone[-1])
                rows.append(ctx.project(ctx.features[image, gone].double().mean(0).float()))
                into |= {first + j: places[-1] for j in gone[:-1]}
        if policy.positions == "keep":
            order = sorted(range(len(places)), key=places.__getitem__)
            places, rows = ([x[i] for i in order] for x in (places, rows))
        index = got.index[sample].tolist()
        assert index == places + [-1] * (len(index) - len(places))
        for row, wanted in zip(got.hidden[sample], rows, strict=False):
            torch.testing.assert_close(row, wanted, atol=1e-5, rtol=1e-5)
        merged = got.merged[sample].tolist()
        assert merged == [into.get(j, -1) for j in range(len(merged))]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "settings",
    [
        dict(keep=12),
        dict(keep=0.4),
        dict(keep=1),
        dict(keep=2),
        dict(keep=1.0),
        dict(keep=1.0, adaptive=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("positions", ["keep", "pack"])
def test_equals_the_formula(batch, settings, positions):
    assert_trimmed(TRIM(**settings, positions=positions), projected_sight(**batch))


def first_column(ctx):
    return ctx.hidden[..., 0]


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("keep", [1.0, 5])
def test_outliers_of_a_function_decide_how_many_stay(scale, keep):
    ctx = projected_sight(["square", "none", ((6, 6), (6, 6))])
    policy = TRIM(keep=keep, adaptive=True, relevance=first_column, scale=scale)
    assert_trimmed(policy, ctx, lambda ctx, sample, j: float(ctx.hidden[sample, j, 0]))


def test_more_outliers_keep_more():
    ctx = projected_sight(["square"])
    counts = [
        TRIM(keep=1.0, adaptive=True, relevance=first_column, scale=scale).select(ctx).index.shape[1]
        for scale in (0.1, 20.0)
    ]
    assert counts[0] == 2 < counts[1]


def test_without_text_the_first_stay():
    ctx = projected_sight(["square"])
    ctx = replace(ctx, text=ctx.text[:, :0])
    assert TRIM(keep=4).select(ctx).index.tolist() == [[0, 1, 2, 35]]
    assert TRIM(keep=1.0, adaptive=True).select(ctx).index.tolist() == [[0, 35]]


def test_broken_relevance_is_the_least():
    ctx = projected_sight(["square"])
    worth = torch.arange(36.0).expand(1, 36).clone()
    worth[0, [35, 20]] = torch.tensor([float("nan"), float("inf")])
    assert TRIM(keep=4, relevance=lambda ctx: worth).select(ctx).index.tolist() == [[32, 33, 34, 35]]


def test_needs_and_counts():
    assert TRIM().needs(0) == Needs(hidden=True, embeds=True, vision=(-2,))
    assert TRIM().kept(576, 1, 0) == 120
    assert TRIM().fixed_count and not TRIM(adaptive=True).fixed_count


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"keep": 0}, "keep: expected a share in (0, 1] or a whole number of tokens per image >= 1, got 0"),
        ({"adaptive": 0.5}, "adaptive: expected True or False, got 0.5"),
        ({"relevance": "none"}, "relevance: expected 'text' or a function of the context, got 'none'"),
        ({"relevance": "clip"}, "relevance: expected 'text' or a function of the context, got 'clip'"),
        ({"scale": 0}, "scale: expected a number > 0, got 0"),
        ({"scale": float("inf")}, "scale: expected a number > 0, got inf"),
        ({"positions": "own"}, "positions: expected 'keep' or 'pack', got 'own'"),
    ],
)
def test_settings(settings, said):
    with pytest.raises(ValueError) as error:
        TRIM(**settings)
    assert str(error.value) == said


def test_a_function_of_another_shape():
    with pytest.raises(
        ValueError, match=r"^relevance: expected a function that returns \(1, 36\), got \(1, 6\)$"
    ):
        TRIM(relevance=lambda ctx: ctx.mask[:, :6].float()).select(sight())
