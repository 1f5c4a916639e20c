"""FastVID against loops over segments, frames, tokens and peaks: which stay, and what is merged into them."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from helpers.contexts import kept_lists, patch_scores
from helpers.videos import NEWLINE, frames_of_images, videos
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.fastvid import FastVID

VIDEO = [[(4, 5)] * 6]
BATCHES = [
    pytest.param([VIDEO], {}, id="one"),
    pytest.param([VIDEO, [[(4, 5)] * 3]], {"cls": True}, id="cls"),
    pytest.param([[[(4, 5)] * 5 + [NEWLINE], [(2, 3)] * 3], [], [[(4, 4)] * 2]], {}, id="ragged"),
    pytest.param([[[(3, 3), (2, 4), (5, 2)]], [[(4, 4)]]], {}, id="other-shapes"),
]
MORE = [
    pytest.param({}, id="usual"),
    pytest.param({"segments": 2, "threshold": 0.0}, id="two-segments"),
    pytest.param({"segments": 1, "threshold": 0.0, "period": 2, "own": 0.0}, id="one-segment"),
    pytest.param({"segments": 3, "threshold": 0.3, "context": 1.0, "period": 3}, id="peaks-alone"),
    pytest.param({"context": 0.0}, id="no-peaks"),
]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cut(x, frames, segments, threshold):
    """The frames of each segment."""
    means = [x[places].mean(0) for places in frames]
    alike = [float(unit(a) @ unit(b)) for a, b in pairwise(means)]
    least = sorted(range(len(alike)), key=lambda t: alike[t])[: segments - 1]
    out = [[0]]
    for t, cosine in enumerate(alike):
        if t in least or cosine < threshold:
            out.append([])
        out[-1].append(t + 1)
    return out


def by_density(x, places):
    """Places in falling order of density times the distance to a denser one."""
    rows = x[places]
    apart = np.linalg.norm(rows[:, None] - rows[None], axis=-1) / math.sqrt(x.shape[1])
    density = [math.exp(-np.mean(np.sort(line)[:4] ** 2)) for line in apart]
    value = []
    for i, own in enumerate(density):
        denser = [apart[i, j] for j, other in enumerate(density) if other > own]
        value.append(own * min(denser, default=apart.max()))
    return [places[i] for i in sorted(range(len(places)), key=lambda i: -value[i])]


def shares(sizes, keep):
    kept = [0] * len(sizes)
    while sum(kept) < min(keep, sum(sizes)):
        kept[min((t for t in range(len(sizes)) if kept[t] < sizes[t]), key=lambda t: kept[t])] += 1
    return kept


def slow(x, scores, frames, rest, keep, segments=8, threshold=0.9, context=0.4, period=4, own=0.6):
    """Places of one image that stay, and their rows."""
    sizes = [len(places) for places in frames]
    each, rows = shares(sizes, keep), {}
    peaks = [0 if each == sizes else int(k * context) for k in each]
    salient, left, order = [], [], []
    for t, places in enumerate(frames):
        best = sorted(places, key=lambda p: -scores[t][p - places[0]])[: each[t] - peaks[t]]
        salient.append(best)
        left.append([p for p in places if p not in best])
        order.append(by_density(x, left[t]))
    runs = cut(x, frames, segments, threshold)
    want, part = [0] * len(frames), [-1.0] * len(frames)
    for run in runs:
        chosen = run[::-1][::period]
        total = sum(peaks[t] for t in run)
        for t in chosen:
            want[t], part[t] = total // len(chosen), total % len(chosen) / len(chosen)
    taken, turn = [min(n, len(o)) for n, o in zip(want, order, strict=True)], 0
    while sum(taken) < sum(peaks):  # what is left over goes round by round, largest remainders first
        for t in sorted(range(len(frames)), key=lambda t: -part[t]):
            wanted = want[t] + turn + 1
            if wanted <= len(order[t]) and sum(taken) < sum(peaks):
                taken[t] = wanted
        turn += 1
    for run in runs:
        sources = [p for t in run for p in left[t]]
        for t in run:
            targets = sorted(order[t][: taken[t]])
            into = [int(np.argmax(unit(x[p]) @ unit(x[targets]).T)) for p in sources] if targets else []
            for number, target in enumerate(targets):
                mine = [p for p, i in zip(sources, into, strict=True) if i == number]
                w = max(own, 1 / (len(mine) + 1))
                rows[target] = w * x[target] + (1 - w) * x[mine].mean(0)
    rows |= {p: x[p] for places in salient for p in places} | {p: x[p] for p in rest[: keep - sum(each)]}
    return sorted(rows), [rows[p] for p in sorted(rows)]


@pytest.mark.parametrize("samples, settings", BATCHES)
@pytest.mark.parametrize("keep", [3, 30, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("more", MORE)
def test_equals_the_formula(samples, settings, keep, more):
    ctx = videos(samples, (-2,), **settings)
    out = FastVID(keep, **more).select(ctx)
    index, hidden = (out.index, out.hidden) if isinstance(out, Reduction) else (out, None)
    got, number = kept_lists(index), 0
    for sample, images in enumerate(frames_of_images(ctx)):
        expected, rows, x = [], [], ctx.hidden[sample].double().cpu().numpy()
        for frames, rest, _ in images:
            n = sum(map(len, frames)) + len(rest)
            scores = [scores_of(ctx, number + t, len(places)) for t, places in enumerate(frames)]
            number += len(frames)
            count = min(n, keep if isinstance(keep, int) else max(1, int(keep * n)))
            places, made = slow(x, scores, frames, rest, count, **more)
            expected += places
            rows += made
        assert got[sample] == expected
        if hidden is not None and rows:
            want = torch.tensor(np.array(rows)).float().to(hidden.device)
            torch.testing.assert_close(hidden[sample, : len(rows)], want, atol=1e-5, rtol=1e-5)


def scores_of(ctx, frame, tokens):
    """Slow attention of a frame whose patches may be fewer than the others'."""
    seen = ctx.vision[-2]
    if seen.mask is None:
        return patch_scores(ctx, -2, frame)
    q, k = (t[frame, :, :tokens].double() for t in (seen.query, seen.key))
    return torch.softmax(q @ k.mT * seen.scale, -1).mean((0, 1)).tolist()


def test_segments():
    """Two scenes of three frames: the first of each is no end of the other."""
    ctx = videos([VIDEO], (-2,))
    hidden = 0.01 * ctx.hidden
    hidden[0, :60] += torch.tensor([1.0] * 4 + [0.0] * 4)
    hidden[0, 60:] += torch.tensor([0.0] * 4 + [1.0] * 4)
    out = FastVID(30, segments=1).select(replace(ctx, hidden=hidden))
    counts = torch.bincount(out.index[0] // 20, minlength=6).tolist()
    assert counts == [3, 3, 9, 3, 3, 9]  # of 5 for each frame 2 are of its segment's last one


def test_merged_rows_are_between_their_own_and_the_mean():
    """Of one frame whose other tokens are all alike, into a peak that keeps nothing of itself."""
    ctx = videos([[[(1, 4)]]], (-2,))
    ctx.hidden[0] = torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0]] * 3 + [[1, 0, 0, 0, 0, 0, 0, 0]])
    kept = FastVID(1, context=1.0, own=0.0).select(ctx)
    w, mean = 1 / 5, ctx.hidden[0].mean(0)
    own = ctx.hidden[0, kept.index[0, 0]]
    torch.testing.assert_close(kept.hidden[0, 0], w * own + (1 - w) * mean)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_sample_changes_nothing_for_others(value):
    ctx = videos([VIDEO, VIDEO], (-2,))
    hidden = ctx.hidden.clone()
    hidden[1] = value
    sound, got = (FastVID(0.3).select(c) for c in (ctx, replace(ctx, hidden=hidden)))
    assert torch.equal(got.index[0], sound.index[0]) and torch.equal(got.hidden[0], sound.hidden[0])
    assert len(set(got.index[1].tolist())) == 36


def test_few_values_keep_exactly_as_many():
    ctx = videos([VIDEO, [[(2, 3)] * 4]], (-2,), few_values=True)
    for keep in (5, 0.3, 0.6):
        out = FastVID(keep).select(ctx)
        index = out.index if isinstance(out, Reduction) else out
        assert (index >= 0).sum(1).tolist() == [FastVID(keep).kept(n, 1, 0) for n in (120, 24)]
        ctx = replace(ctx, hidden=torch.ones_like(ctx.hidden).masked_fill(~ctx.mask[..., None], 0))


def test_needs():
    assert FastVID().layers == (0,) and FastVID().needs(0) == Needs(hidden=True, vision=(-2,))
    packed = FastVID(9, positions="pack").select(videos([VIDEO], (-2,)))
    assert packed.positions == "pack" and packed.index.shape == (1, 9)


def test_no_images():
    assert FastVID().select(videos([[]])).shape == (1, 0)


def test_missing_rows():
    with pytest.raises(
        ValueError, match=r"^ctx\.hidden: expected hidden states \(declare Needs\(hidden=True\)\), got None$"
    ):
        FastVID().select(replace(videos([VIDEO], (-2,)), hidden=None))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": 0}, r"^keep: expected a share in \(0, 1\] or a whole number .*, got 0$"),
        ({"segments": 0}, r"^segments: expected a whole number >= 1, got 0$"),
        ({"threshold": 1.5}, r"^threshold: expected a share in \[0, 1\], got 1\.5$"),
        ({"context": -0.1}, r"^context: expected a share in \[0, 1\], got -0\.1$"),
        ({"period": 0.5}, r"^period: expected a whole number >= 1, got 0\.5$"),
        ({"own": 2}, r"^own: expected a share in \[0, 1\], got 2$"),
        ({"vision_layer": "last"}, r"^vision_layer: expected a whole number, got 'last'$"),
        ({"positions": "none"}, r"^positions: expected 'keep' or 'pack', got 'none'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        FastVID(**settings)
