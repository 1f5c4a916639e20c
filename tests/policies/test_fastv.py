"""FastV against its formula in NumPy loops: softmax over the whole row, heads averaged, last row or all rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, kept_lists, top
from vlmprune.policies import FastV, Needs

CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": ["square"], "last_only": True}, id="last-query-only"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["two", "tall"], "past": True}, id="cached-past"),
    pytest.param({"images": ["square", "tall"], "few_values": True}, id="ties"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 30, 34]]}, id="after-a-stage"),
]


def slow_scores(case, sample, rows):
    """phi_j = mean over rows and heads of softmax(q k / sqrt(d))[row, j], over the keys the row may see."""
    seen = case.ctx.attention
    q, k = seen.query[sample].double().cpu().numpy(), seen.key[sample].double().cpu().numpy()
    H, Sq, D = q.shape
    S = k.shape[1]
    columns = [c for c in seen.columns[sample].tolist() if c >= 0]
    total = np.zeros(len(columns))
    for row in rows:
        for h in range(H):
            logits = k[h // (H // k.shape[0])] @ q[h, row - (S - Sq)] / np.sqrt(D)
            ok = (np.arange(S) <= row) & case.valid[sample].cpu().numpy()
            e = np.where(ok, np.exp(logits), 0.0)
            total += (e / e.sum())[columns] / H
    return (total / len(rows)).round(12)


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("keep", [0.5, 0.13, 4])
@pytest.mark.parametrize("rows", ["last", "mean"])
def test_equals_the_formula(settings, keep, rows):
    made = case(**settings)
    if rows == "mean" and settings.get("last_only"):
        pytest.skip("all rows need all queries")
    got = kept_lists(FastV(layer=2, keep=keep, rows=rows).select(made.ctx))
    for sample, n in enumerate(made.ctx.counts):
        images = len(made.ctx.grids[sample])
        count = min(n, max(1, int(keep * n)) if isinstance(keep, float) else keep * images)
        seen = made.ctx.attention
        used = (seen.last if rows == "last" else seen.rows)[sample].tolist()
        scores = slow_scores(made, sample, [r for r in used if r >= 0])
        assert got[sample] == top(scores, count)


def test_last_row_and_mean_rows_differ():
    made = case(["square"])
    last, mean = (FastV(keep=0.5, rows=rows).select(made.ctx) for rows in ("last", "mean"))
    assert not torch.equal(last, mean)


def test_paper_count_of_a_llava_image():
    """N = 576, R = 0.75: 144 tokens stay."""
    assert FastV(layer=2, keep=0.25).select(case([((24, 24),)], last_only=True).ctx).shape == (1, 144)


def test_needs_every_row_only_for_the_mean():
    assert FastV().needs(2) == Needs(attention="previous", rows="last")
    assert FastV(rows="mean").needs(2) == Needs(attention="previous", rows="all")


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"layer": 0},
            r"^layer: expected a whole number >= 1 \(the score comes from the layer before\), got 0$",
        ),
        ({"layer": 2.0}, r"^layer: expected a whole number >= 1 .*, got 2\.0$"),
        ({"keep": 0.0}, r"^keep: expected a share in \(0, 1\] or a whole number .* >= 1, got 0\.0$"),
        ({"keep": 1.5}, r"^keep: .* got 1\.5$"),
        ({"keep": 0}, r"^keep: .* got 0$"),
        ({"keep": True}, r"^keep: .* got True$"),
        ({"rows": "all"}, r"^rows: expected 'last' or 'mean', got 'all'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        FastV(**settings)


def test_says_what_the_wiring_forgot():
    bare = replace(case(["square"]).ctx, attention=None)
    with pytest.raises(ValueError, match=r"^ctx\.attention: expected query and key"):
        FastV().select(bare)
