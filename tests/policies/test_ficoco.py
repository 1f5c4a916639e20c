"""FiCoCo against its formulas, written out with loops: redundancy, correlation, and what goes where."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, kept_lists, top
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.ficoco import FiCoCo

BATCHES = [
    pytest.param({}, id="one"),
    pytest.param({"images": ["two", "none", "tall"]}, id="ragged"),
    pytest.param({"images": ["square", "tall"], "after": [0, 3], "past": True}, id="no-text-and-a-past"),
    pytest.param({"images": ["two", "square"], "kept": [[0, 3, 4, 9, 20, 21, 30], None]}, id="later"),
    pytest.param({"images": [((20, 30),)], "H": 2}, id="two-targets-of-600"),
]


def logits(made, sample, i, j):
    """Head mean of scaled query times key, of two key positions, without softmax or causal mask."""
    seen, total = made.ctx.attention, 0.0
    heads, shared = seen.query.shape[1], seen.query.shape[1] // seen.key.shape[1]
    first = seen.key.shape[2] - seen.query.shape[2]
    for h in range(heads):
        q, k = seen.query[sample, h, i - first], seen.key[sample, h // shared, j]
        total = total + (q.double() @ k.double().T) * seen.scale / heads
    return total.cpu().numpy()


def slow(made, sample, drop, policy):
    """Who stays, each one's row, and for every token the kept one that it gave most to, -1 = none."""
    columns = [c for c in made.ctx.attention.columns[sample].tolist() if c >= 0]
    text = [r for r in made.ctx.attention.rows[sample].tolist() if r > max(columns)]
    n, at = len(columns), torch.tensor(columns)
    words = torch.tensor(text, dtype=torch.int64)
    vv, vt, tv = (logits(made, sample, i, j) for i, j in ((at, at), (at, words), (words, at)))
    redundancy = [
        policy.g * sum(vv[i]) - (1 - policy.g) * (sum(vt[i]) / len(text) if text else 0.0) for i in range(n)
    ]
    redundancy[0] = -math.inf
    kept = top([-round(x, 9) for x in redundancy], n - drop)
    gone = [i for i in range(n) if i not in kept]
    rows = made.ctx.hidden[sample, :n].double().cpu().numpy()
    gains, weight, into = np.zeros_like(rows), np.zeros(n), [-1] * n
    correlation = {}
    for i in gone:
        correlation[i] = policy.a * vv[i] + (1 - policy.a) * sum(
            (vt[i][t] * tv[t] for t in range(len(text))), np.zeros(n)
        )
        correlation[i][i] = -math.inf
        if policy.targets == "kept":
            correlation[i][gone] = -math.inf
    many = max((above(row, policy.epsilon) for row in correlation.values()), default=0)
    for i, row in correlation.items():
        targets = [
            j for j in sorted(range(n), key=lambda j, row=row: (-row[j], j))[:many] if row[j] > -math.inf
        ]
        shares = np.exp([row[j] - max(row) for j in targets])
        shares /= shares.sum()
        for j, share in zip(targets, shares, strict=True):
            gains[j] += share * rows[i]
            weight[j] += share
        into[i] = next((j for j in targets if j in kept), -1)
    made_rows = rows + gains
    return kept, (made_rows / (1 + weight)[:, None] if policy.merge == "mean" else made_rows)[kept], into


def above(row, epsilon):
    """How many of a row are above its quantile by linear interpolation, which the row's own -inf takes part in."""
    line, place = np.sort(row), epsilon * (len(row) - 1)
    return sum(x > line[int(place + 1e-9)] for x in row)


SETTINGS = [
    dict(drop=7),
    dict(drop=0.6, targets="kept", merge="mean", positions="keep"),
    dict(drop=5, g=0.0, a=1.0, epsilon=0.9),
    dict(drop=0.4, g=1.0, a=0.1, epsilon=0.8, merge="mean"),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_the_formula(batch, settings):
    made, policy = case(**batch), FiCoCo(layers=(2,), **{"positions": "pack"} | settings)
    got = policy.select(made.ctx)
    assert isinstance(got, Reduction) and got.positions == policy.positions
    for sample, (n, index) in enumerate(zip(made.ctx.counts, kept_lists(got.index), strict=True)):
        if not n:
            assert index == [] and (got.merged[sample] == -1).all()
            continue
        kept, rows, into = slow(made, sample, n - policy.kept(n, made.ctx.image_counts()[sample], 2), policy)
        assert index == kept
        assert got.merged[sample, :n].tolist() == into
        torch.testing.assert_close(
            got.hidden[sample, : len(kept)].double(), torch.tensor(rows), atol=1e-4, rtol=1e-4
        )


def test_what_none_gives_to_stays_as_it_is():
    """And all that goes arrives: weights of a dropped token add up to 1 where only kept ones receive."""
    made = case()
    got = FiCoCo(layers=(2,), drop=6, targets="kept", positions="pack").select(made.ctx)
    before = made.ctx.hidden[0]
    untouched = [j for j in got.index[0].tolist() if j not in got.merged[0].tolist()]
    assert untouched
    for j in untouched:
        assert torch.equal(got.hidden[0, got.index[0].tolist().index(j)], before[j])
    torch.testing.assert_close(got.hidden[0].sum(0), before.sum(0), atol=1e-4, rtol=1e-4)


def test_released_code_loses_what_goes_to_dropped_tokens():
    """Of tokens 1 to 4, the stronger the more alike all others, three go: to one another, or to the one that stays."""
    made = case()
    seen = made.ctx.attention
    strong = torch.zeros_like(seen.key)
    strong[:, :, seen.columns[0, 1:5]] = torch.tensor([2.0, 3.0, 4.0, 5.0])[:, None]
    ctx = replace(made.ctx, attention=replace(seen, query=strong.repeat_interleave(2, 1), key=strong))
    lost, all_there = (
        FiCoCo(layers=(2,), drop=3, targets=by, positions="pack").select(ctx) for by in ("any", "kept")
    )
    assert kept_lists(lost.index) == kept_lists(all_there.index) == [[0, 1, *range(5, 36)]]
    assert torch.equal(lost.hidden, ctx.hidden[:, lost.index[0]]) and (lost.merged == -1).all()
    torch.testing.assert_close(all_there.hidden[0, 1], ctx.hidden[0, 1:5].sum(0))
    assert all_there.merged[0].tolist() == [-1, -1, 1, 1, 1] + [-1] * 31


def test_ties_go_to_the_lower_number():
    made = case()
    seen = made.ctx.attention
    ctx = replace(made.ctx, attention=replace(seen, query=seen.query * 0, key=seen.key * 0))
    got = FiCoCo(layers=(2,), drop=3, positions="pack").select(ctx)
    assert kept_lists(got.index) == [[*range(33)]]
    assert got.merged[0].tolist() == [-1] * 33 + [0] * 3
    torch.testing.assert_close(got.hidden[0, 0], ctx.hidden[0, [0, 33, 34, 35]].sum(0))


def test_released_counts():
    """14 a layer of 576 from layer 6 on: 212 see the last layer, 422 on average."""
    policy, n, seen = FiCoCo(positions="pack"), 576, []
    for layer in range(32):
        n = policy.kept(n, 1, layer) if layer in policy.layers else n
        seen.append(n)
    assert (seen[5], seen[6], seen[31], round(sum(seen) / 32)) == (576, 562, 212, 422)
    assert (policy.kept(1152, 2, 6), policy.kept(10, 1, 6), policy.kept(0, 0, 6)) == (1124, 1, 0)
    assert policy.needs(6) == Needs(hidden=True, attention="previous", rows="all")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"drop": 1.0}, r"^drop: expected a share in \[0, 1\) or a whole number >= 0, got 1.0$"),
        ({"drop": True}, r"^drop: expected a share in \[0, 1\) or a whole number >= 0, got True$"),
        ({"g": 1.5}, r"^g: expected a share in \[0, 1\], got 1.5$"),
        ({"epsilon": -0.1}, r"^epsilon: expected a share in \[0, 1\], got -0.1$"),
        ({"targets": "all"}, r"^targets: expected 'any' or 'kept', got 'all'$"),
        ({"merge": "max"}, r"^merge: expected 'sum' or 'mean', got 'max'$"),
        (
            {"layers": (0, 3)},
            r"^layer: expected a whole number >= 1 \(the score comes from the layer before\)",
        ),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        FiCoCo(**settings)
