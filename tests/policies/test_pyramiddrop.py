"""PyramidDrop against its formula: full-row softmax of the last prompt row, head mean, falling counts."""

import numpy as np
import pytest
import torch

from helpers.contexts import attention_row, case, kept_lists, top
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.pyramiddrop import PyramidDrop
from vlmprune.policies.schedule import stage_counts

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["tall"], "last_only": True}, id="last-query-only"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["two", "tall"], "past": True}, id="cached-past"),
    pytest.param({"images": ["square", "two"], "few_values": True}, id="ties"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 22, 30, 34]]}, id="after-a-stage"),
    pytest.param({"images": [((1, 1),)]}, id="one-token"),
]


def slow_scores(made, sample):
    seen = made.ctx.attention
    last, heads = int(seen.last[sample]), seen.query.shape[1]
    return np.mean([attention_row(made, sample, last, h) for h in range(heads)], 0).round(12)


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("ratio", [0.5, 0.3, 1.0])
def test_equals_the_formula(settings, ratio):
    made = case(**settings, layer=16)
    choice = PyramidDrop(ratio=ratio, positions="pack").select(made.ctx)
    got = kept_lists(choice.index)
    for sample, n in enumerate(made.ctx.counts):
        count = min(n, max(1, int(n * ratio + 1e-6)))
        scores = slow_scores(made, sample)
        best = top(scores, count)
        if settings.get("few_values"):  # an ulp may tell equal tokens apart: no better one goes
            close = scores.round(7)
            assert len(got[sample]) == count and sorted(close[got[sample]]) == sorted(close[best])
        else:
            assert got[sample] == best


def test_a_share_counts_from_the_previous_stage_a_list_from_the_image():
    made = case(["square"], kept=[list(range(14))], layer=16)
    assert PyramidDrop(ratio=0.4, positions="pack").select(made.ctx).index.shape == (1, 5)  # int(0.4 * 14)
    assert PyramidDrop(ratio=(0.4, 0.3, 0.1), positions="pack").select(made.ctx).index.shape == (
        1,
        10,
    )  # int(0.3 * 36)
    assert PyramidDrop(ratio=(0.9, 0.8, 0.1), positions="pack").select(made.ctx).index.shape == (
        1,
        14,
    )  # never more than there are


@pytest.mark.parametrize("n", [576, 577, 729, 2880, 15, 9])
def test_released_list_and_default_count_alike(n):
    released = [int(n * share) for share in (0.5, 0.25, 0.125)]
    assert stage_counts(PyramidDrop(positions="pack"), n) == list(zip((8, 16, 24), released, strict=True))
    assert stage_counts(PyramidDrop(ratio=(0.5, 0.25, 0.125), positions="pack"), n) == stage_counts(
        PyramidDrop(positions="pack"), n
    )


def test_positions():
    ctx = case(["two", "tall"], layer=8).ctx
    packed, kept = PyramidDrop(positions="pack").select(ctx), PyramidDrop(positions="keep").select(ctx)
    assert isinstance(packed, Reduction) and packed.positions == "pack" and packed.hidden is None
    assert torch.equal(packed.index, kept)


def test_needs_the_own_layer():
    assert PyramidDrop(positions="pack").needs(8) == Needs(attention="own", rows="last")
    assert PyramidDrop(layers=[2, 5], positions="pack") == PyramidDrop(layers=(2, 5), positions="pack")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layers": ()}, r"^layers: expected one or more layers, ascending, got \(\)$"),
        ({"layers": (8, 8)}, r"^layers: expected one or more layers, ascending, got \(8, 8\)$"),
        ({"layers": 8}, r"^layers: expected one or more layers, ascending, got 8$"),
        ({"layers": (-1, 8)}, r"^layer: expected a whole number >= 0, got -1$"),
        (
            {"ratio": 0.0},
            r"^ratio: expected a share in \(0, 1\] as a float \(1\.0 is everything\), got 0\.0$",
        ),
        ({"ratio": 1}, r"^ratio: expected a share in \(0, 1\] as a float \(1\.0 is everything\), got 1$"),
        ({"ratio": (0.5, 0.2)}, r"^ratio: expected 3 falling shares of the image, got \(0\.5, 0\.2\)$"),
        (
            {"ratio": (0.2, 0.5, 0.1)},
            r"^ratio: expected 3 falling shares of the image, got \(0\.2, 0\.5, 0\.1\)$",
        ),
        (
            {"ratio": (1.5, 0.5, 0.1)},
            r"^ratio: expected a share in \(0, 1\] as a float \(1\.0 is everything\), got 1\.5",
        ),
        ({"positions": "drop"}, r"^positions: expected 'keep' or 'pack', got 'drop'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        PyramidDrop(**settings)
