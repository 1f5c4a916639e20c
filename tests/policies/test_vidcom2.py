"""VidCom2 against loops over frames, tokens and channels: a frame's share, then the least typical tokens, exactly so many."""

from dataclasses import replace
from math import exp, sqrt

import pytest
import torch

from helpers.contexts import kept_lists
from helpers.videos import NEWLINE, frames_of_images, videos
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.vidcom2 import VidCom2

VIDEO = [[(3, 4)] * 6]
BATCHES = [
    pytest.param([VIDEO], id="one"),
    pytest.param([[[(3, 4)] * 5 + [NEWLINE], [(2, 2)] * 3], [], [[(4, 3)] * 2]], id="ragged"),
    pytest.param([[[(3, 3), (2, 4), (5, 1)]], [[(4, 4)]]], id="other-shapes"),
]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def gaussians(a, b):
    far = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return sum(exp(-far / (2 * 2.0**power)) for power in range(-3, 2))


def unit_rows(rows, channels):
    """In the channels of least variance, of length 1."""
    centre = mean(rows)
    variance = [sum((row[c] - centre[c]) ** 2 for row in rows) for c in range(len(centre))]
    quiet = sorted(range(len(centre)), key=lambda c: variance[c])[: int(channels * len(centre))]
    picked = [[row[c] for c in quiet] for row in rows]
    return [[x / sqrt(sum(y * y for y in row)) for x in row] for row in picked]


def slow(rows, frames, rest, keep, share, channels=0.5, temperature=0.01):
    """Places of one image that stay; ``share`` is the budget as one."""
    places = [place for frame in frames for place in frame]
    unit = dict(zip(places, unit_rows([rows[place] for place in places], channels), strict=True))
    centre = mean(list(unit.values()))
    to_video = {place: gaussians(unit[place], centre) for place in places}
    unlike = [-sum(to_video[place] for place in frame) / len(frame) for frame in frames]
    weight = [exp((u - max(unlike)) / temperature) for u in unlike]
    weight = [w / sum(weight) for w in weight]
    level = sum(w * len(f) for w, f in zip(weight, frames, strict=True)) / len(places)
    granted, score = [], {}
    for w, frame in zip(weight, frames, strict=True):
        here = mean([unit[place] for place in frame])
        score |= {place: to_video[place] + gaussians(unit[place], here) for place in frame}
        count = max(1, round(min(1, share * (1 + w - level)) * len(frame)))
        granted += sorted(frame, key=score.get)[:count]
    others = [place for place in places if place not in granted]
    return sorted((sorted(granted, key=score.get) + sorted(others, key=score.get) + rest)[:keep])


@pytest.mark.parametrize("samples", BATCHES)
@pytest.mark.parametrize(
    "keep, more",
    [(1, {}), (7, {}), (0.25, {}), (0.5, {"temperature": 0.3}), (0.8, {"channels": 1.0}), (1.0, {})],
)
def test_equals_the_formula(samples, keep, more):
    for seed in range(3):
        ctx = videos(samples, seed=seed, width=12)
        got = kept_lists(VidCom2(keep, **more).select(ctx))
        for sample, images in enumerate(frames_of_images(ctx)):
            expected, rows = [], ctx.hidden[sample].double().tolist()
            for frames, rest, _ in images:
                n = sum(map(len, frames)) + len(rest)
                count = min(n, keep if isinstance(keep, int) else max(1, int(keep * n)))
                expected += slow(
                    rows, frames, rest, count, keep if isinstance(keep, float) else count / n, **more
                )
            assert got[sample] == expected


def scene(**settings):
    """Six frames of almost the same, and one of its own."""
    ctx = videos([[[(3, 4)] * 7]], width=12)
    still = ctx.hidden[0, :12].repeat(7, 1) + 0.01 * ctx.hidden[0]
    still[36:48] = ctx.hidden[0, 36:48]
    return replace(ctx, hidden=still[None], **settings)


def test_a_frame_of_its_own_keeps_more():
    """Almost twice as much as the others: 1 + 1 - 1/7 to 1 - 1/7."""
    kept = VidCom2(0.5).select(scene())[0]
    counts = torch.bincount(kept // 12, minlength=7).tolist()
    assert len(kept) == 42 and counts[3] == 11 and sum(counts) - counts[3] == 31 and max(counts[:3]) <= 6


def test_no_frame_gets_more_than_it_has():
    kept = VidCom2(0.9).select(scene())[0]
    assert len(kept) == int(0.9 * 84) and torch.bincount(kept // 12, minlength=7)[3] == 12


@pytest.mark.parametrize("few_values", [False, True])
def test_equal_tokens_keep_the_first(few_values):
    """Of three kinds of token, and of one, exactly as many as asked for stay; equal ones by their number."""
    ctx = videos([VIDEO], few_values=True)
    if not few_values:
        ctx = replace(ctx, hidden=torch.ones_like(ctx.hidden))
        assert VidCom2(0.25).select(ctx).tolist() == [[12 * t + i for t in range(6) for i in range(3)]]
    assert VidCom2(0.4).select(ctx).shape == (1, 28)


def test_a_broken_sample_changes_nothing_for_others():
    ctx = videos([VIDEO, VIDEO])
    hidden = ctx.hidden.clone()
    hidden[1] = float("nan")
    sound, got = VidCom2(20).select(ctx), VidCom2(20).select(replace(ctx, hidden=hidden))
    assert torch.equal(got[0], sound[0]) and (got[1] >= 0).all() and len(set(got[1].tolist())) == 20


def test_needs():
    assert VidCom2().layers == (0,) and VidCom2().needs(0) == Needs(hidden=True)
    packed = VidCom2(9, positions="pack").select(videos([VIDEO]))
    assert packed.positions == "pack" and packed.index.shape == (1, 9)


def test_missing_rows():
    with pytest.raises(
        ValueError, match=r"^ctx\.hidden: expected hidden states \(declare Needs\(hidden=True\)\), got None$"
    ):
        VidCom2().select(replace(videos([VIDEO]), hidden=None))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": 0}, r"^keep: expected a share in \(0, 1\] or a whole number .*, got 0$"),
        ({"channels": 0.0}, r"^channels: expected a share in \(0, 1\], got 0\.0$"),
        ({"channels": 1.5}, r"^channels: expected a share in \(0, 1\], got 1\.5$"),
        ({"temperature": 0}, r"^temperature: expected a number > 0, got 0$"),
        ({"temperature": float("inf")}, r"^temperature: expected a number > 0, got inf$"),
        ({"positions": "none"}, r"^positions: expected 'keep' or 'pack', got 'none'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        VidCom2(**settings)
