"""VScan against its formulas: local and global patches, merging into the nearest, attention of the last row."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, images_in, kept_lists, patch_scores, sight, top
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.choose import rank_within
from vlmprune.policies.methods.vscan import VScan
from vlmprune.policies.parts.windows import windows_of

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged-mixed-grids"),
    pytest.param({"images": [((8, 12),)], "few_values": True}, id="ties"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
]
LAYERS = (-2, 5)


def slow_scan(shallow, deep, grid, keep, local_ratio, window):
    """Windows one by one; then the best of the deep layer among all that is left."""
    rows, columns = grid
    groups = {}
    for r in range(rows):
        for c in range(columns):
            groups.setdefault((r // window, c // window), []).append(r * columns + c)
    each = int(keep * local_ratio) // len(groups)
    local = []
    for patches in groups.values():
        local += [patches[i] for i in top([shallow[p] for p in patches], each)]
    left = [p for p in range(rows * columns) if p not in local]
    return sorted(local + [left[i] for i in top([deep[p] for p in left], keep - len(local))])


def slow_merge(rows, kept):
    """Mean of each kept row and the dropped ones most cosine-similar to it."""
    groups = {j: [j] for j in kept}
    for j in range(len(rows)):
        if j not in kept:
            alike = [
                round(float(rows[j] @ rows[t] / np.linalg.norm(rows[j]) / np.linalg.norm(rows[t])), 6)
                for t in kept
            ]
            groups[kept[alike.index(max(alike))]].append(j)
    return [rows[group].mean(0) for group in groups.values()]


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize(
    "keep, ratio, window", [(8, 0.5, 3), (9, 0.5, 2), (0.4, 0.75, 6), (5, 0.0, 3), (7, 1.0, 2), (99, 0.5, 6)]
)
def test_first_stage_equals_the_formula(settings, keep, ratio, window):
    ctx = sight(**settings, layers=LAYERS)
    got = VScan(keep, local_ratio=ratio, window=window, positions="pack").select(ctx)
    assert got.positions == "pack"
    for sample, here in enumerate(images_in(ctx)):
        expected, merged = [], []
        for number, first, (r, c) in here:
            count = min(r * c, keep) if isinstance(keep, int) else max(1, int(keep * r * c))
            shallow, deep = (patch_scores(ctx, layer, number) for layer in (5, -2))
            kept = slow_scan(shallow, deep, (r, c), count, ratio, window)
            expected += [first + p for p in kept]
            merged += slow_merge(ctx.hidden[sample, first : first + r * c].double().cpu().numpy(), kept)
        assert got.index[sample].tolist() == expected + [-1] * (got.index.shape[1] - len(expected))
        for row, right in zip(got.hidden[sample].double().cpu().numpy(), merged, strict=False):
            assert row == pytest.approx(right, abs=1e-5)


def test_constant_rows_stay_as_they_are():
    """The mean includes the kept row itself, so equal rows merge to the same row."""
    ctx = sight(["square"], LAYERS)
    rows = VScan(8, positions="pack").select(replace(ctx, hidden=torch.ones_like(ctx.hidden))).hidden
    assert rows.unique().tolist() == [1.0]


@pytest.mark.parametrize("keep, then", [(96, 32), (192, 64), (288, 96)])
def test_published_counts(keep, then):
    """24 x 24: each of 16 windows gives half of T / 16 patches; the mean over 32 layers is 64, 128 or 192."""
    ctx = sight([((24, 24),)], LAYERS, H=1)
    got = VScan(keep, then, positions="pack").select(ctx)
    assert got.index.shape == (1, keep) and (16 * keep + 16 * then) / 32 in (64, 128, 192)
    window = torch.tensor(windows_of((24, 24), 6))
    assert window[got.index[0]].bincount(minlength=16).min() >= keep // 32
    later = case([((24, 24),)], layer=16, kept=[got.index[0].tolist()], last_only=True).ctx
    assert VScan(keep, then, positions="pack").select(later).index.shape == (1, then)


def test_windows():
    assert windows_of((3, 5), 2) == [0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert windows_of((2, 2), 6) == [0, 0, 0, 0]


def test_rank_within():
    scores = torch.tensor([[3.0, 1, 3, 2, 9, 2], [0, 0, 0, 0, 0, 0]])
    groups = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 0, 2, 0, 2, 0]])
    assert rank_within(scores, groups).tolist() == [[0, 2, 1, 1, 0, 2], [0, 0, 1, 1, 2, 2]]


STAGE_TWO = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["two", "none", "tall"], "past": True}, id="ragged-cached-past"),
    pytest.param({"images": ["square", "two"], "few_values": True, "last_only": True}, id="ties"),
    pytest.param({"images": ["two"], "kept": [[0, 3, 7, 20, 21, 22, 30, 34]]}, id="after-the-scan"),
]


def last_row(made, sample):
    """Softmax of the last row over every real key, mean over heads, at the visual columns."""
    seen = made.ctx.attention
    q, k = seen.query[sample, :, -1].double().cpu().numpy(), seen.key[sample].double().cpu().numpy()
    real, total = made.valid[sample].cpu().numpy(), 0
    for h in range(len(q)):
        e = np.exp(k[h // (len(q) // len(k))] @ q[h] * seen.scale) * real
        total = total + e / e.sum() / len(q)
    return [total[c].round(12) for c in seen.columns[sample].tolist() if c >= 0]


@pytest.mark.parametrize("settings", STAGE_TWO)
@pytest.mark.parametrize("then", [3, 0.5, 100])
def test_second_stage_equals_the_formula(settings, then):
    made = case(**settings, layer=16)
    got = VScan(then=then, positions="pack").select(made.ctx)
    assert got == Reduction(got.index, None, "pack")
    for sample, n in enumerate(made.ctx.counts):
        wanted = then * len(made.ctx.grids[sample]) if isinstance(then, int) else max(1, int(then * n))
        assert kept_lists(got.index)[sample] == top(last_row(made, sample), min(n, wanted))
    kept = VScan(then=then, positions="keep").select(made.ctx)
    assert torch.equal(kept, got.index)


def test_no_images():
    assert VScan(positions="pack").select(sight(["none"], LAYERS)).shape == (1, 0)


def test_needs():
    assert VScan(positions="pack").layers == (0, 16)
    assert VScan(positions="pack").needs(0) == Needs(hidden=True, vision=(-2, 5))
    assert VScan(vision_layer=5, positions="pack").needs(0) == Needs(hidden=True, vision=(5,))
    assert VScan(positions="pack").needs(16) == Needs(attention="own")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": 0}, r"^keep: expected a share in .*, got 0$"),
        ({"then": 0.0}, r"^then: expected a share in .*, got 0\.0$"),
        ({"layer": 0}, r"^layer: expected a whole number >= 1 \(stage 1 is at layer 0\), got 0$"),
        ({"local_ratio": 2}, r"^local_ratio: expected a share in \[0, 1\], got 2$"),
        ({"window": 0}, r"^window: expected a whole number >= 1, got 0$"),
        ({"shallow_layer": None}, r"^shallow_layer: expected a whole number, got None$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        VScan(**settings)
