"""STAR against its two means: of what patches pay one another, and of what the text's rows pay to visual columns."""

import numpy as np
import pytest
import torch

from helpers.contexts import attention_row, images_in, kept_lists, sight, text_case, top
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.star import STAR

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
]


def among_patches(ctx, image):
    """Column means of the map of patches alone, head by head, row by row."""
    seen = ctx.vision[-2]
    queries, keys = (t[image, :, int(seen.cls) :].double().cpu().numpy() for t in (seen.query, seen.key))
    total = np.zeros(keys.shape[1])
    for q, k in zip(queries, keys, strict=True):
        for row in q:
            paid = np.exp(k @ row * seen.scale)
            total += paid / paid.sum() / len(q) / len(queries)
    return total


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("keep", [5, 0.25, 100])
def test_first_stage_equals_the_formula(batch, keep):
    ctx = sight(**batch)
    got = kept_lists(STAR(keep).select(ctx))
    for sample, here in enumerate(images_in(ctx)):
        for number, first, (r, c) in here:
            count = min(r * c, keep) if isinstance(keep, int) else max(1, int(keep * r * c))
            scores = among_patches(ctx, number).round(5 if batch.get("few_values") else 9)
            own = [i - first for i in got[sample] if first <= i < first + r * c]
            expected = top(scores.tolist(), count)
            if batch.get("few_values"):  # an ulp may tell equal patches apart: no better one goes
                assert len(own) == count and sorted(scores[own]) == sorted(scores[expected])
            else:
                assert own == expected


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
        pytest.param({"images": ["two", "square"], "past": True}, id="cached-past"),
        pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 22, 30, 34]]}, id="after-a-stage"),
    ],
)
@pytest.mark.parametrize("then", [3, 0.5])
def test_second_stage_equals_the_formula(batch, then):
    made = text_case(**batch, layer=7)
    got = kept_lists(STAR(then=then, layer=7).select(made.ctx))
    for sample, n in enumerate(made.ctx.counts):
        rows = [r for r in made.ctx.attention.rows[sample].tolist() if r >= 0]
        paid = [
            attention_row(made, sample, row, h)
            for row in rows
            for h in range(made.ctx.attention.query.shape[1])
        ]
        count = int(n * then) if isinstance(then, float) else then * len(made.ctx.grids[sample])
        assert got[sample] == (top(np.mean(paid, 0).round(12).tolist(), min(n, max(1, count))) if n else [])


def test_to_the_letter_all_tokens_score_the_same():
    """Why this is a reading: the mean over what a row pays is one over the number of columns, whatever the row."""
    seen = sight().vision[-2]
    patches = torch.softmax(seen.query[0, :, 1:] @ seen.key[0, :, 1:].transpose(1, 2) * seen.scale, -1)
    torch.testing.assert_close(patches.mean(-1), torch.full(patches.shape[:2], 1 / 36))


def test_without_text_tokens_stay_spread_evenly():
    made = text_case(["square", "square"], layer=7, after=[0, 4])
    kept = kept_lists(STAR(then=6, layer=7).select(made.ctx))
    steps = np.diff(kept[0])
    assert len(kept[0]) == 6 and steps.min() >= 3 and steps.max() <= 9
    assert kept[1] != kept[0]


def test_needs_and_counts():
    policy = STAR(keep=288, then=96)
    assert (policy.needs(0), policy.needs(16)) == (
        Needs(vision=(-2,)),
        Needs(attention="previous", rows="text"),
    )
    assert (policy.kept(1152, 2, 0), policy.kept(576, 2, 16)) == (576, 192)
    assert STAR().at(0.25) == STAR(keep=0.25, then=0.25)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"then": 0},
            r"^then: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        ({"layer": 0}, r"^layer: expected a whole number >= 1 \(stage 1 is at layer 0\), got 0$"),
        ({"vision_layer": None}, r"^vision_layer: expected a whole number, got None$"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        STAR(**settings)
