"""DyCoke's temporal merging against loops over frames of four, and against what the paper's K keeps."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.contexts import kept_lists
from helpers.videos import NEWLINE, frames_of_images, videos
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.dycoke import DyCoke
from vlmprune.policies.parts.lattice import lattice

VIDEO = [[(3, 4)] * 8]
BATCHES = [
    pytest.param([VIDEO], {}, id="one"),
    pytest.param([[[(3, 4)] * 7 + [NEWLINE], [(2, 2)] * 3], [], [[(4, 3)] * 2]], {}, id="ragged"),
    pytest.param([VIDEO, [[(2, 3)] * 5]], {"few_values": True}, id="ties"),
    pytest.param([[[(3, 3), (2, 4), (3, 3), (2, 4), (2, 4)], [(4, 4)]]], {}, id="other-shapes"),
]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        sum(x * x for x in a) * sum(y * y for y in b)
    )


def compared(t, crops):
    """With which frame the t-th is compared, or None."""
    other = {0: None, 1: t - 1, 2: t - 2, 3: t - 1}[t % 4]
    alike = other is not None and crops[t][2:] == crops[other][2:]
    return other if alike else None


def dealt(sizes, count):
    """``count`` dealt out one by one."""
    shares = dict.fromkeys(sizes, 0)
    for _ in range(min(count, sum(sizes.values()))):
        free = [t for t in sizes if shares[t] < sizes[t]]
        shares[min(free, key=lambda t: shares[t])] += 1
    return shares


def slow(rows, frames, rest, crops, keep):
    """Places of one image that stay."""
    sizes = {t: len(places) for t, places in enumerate(frames)}
    anchors = {t: n for t, n in sizes.items() if compared(t, crops) is None}
    first = dealt(anchors, keep)
    then = dealt({t: n for t, n in sizes.items() if t not in anchors}, keep - sum(first.values()))
    kept = [frames[t][p] for t, k in first.items() for p in lattice((crops[t].rows, crops[t].columns), k)]
    for t, k in then.items():
        pairs = zip(frames[t], frames[compared(t, crops)], strict=True)
        alike = {place: round(cosine(rows[place], rows[other]), 6) for place, other in pairs}
        kept += sorted(alike, key=lambda place: (alike[place], place))[:k]
    return sorted(kept + rest[: keep - len(kept)])


@pytest.mark.parametrize("samples, settings", BATCHES)
@pytest.mark.parametrize("keep", [1, 9, 30, 0.25, 0.475, 0.7, 1.0])
def test_equals_the_formula(samples, settings, keep):
    ctx = videos(samples, **settings)
    got = kept_lists(DyCoke(keep).select(ctx))
    for sample, images in enumerate(frames_of_images(ctx)):
        expected, rows = [], ctx.hidden[sample].double().tolist()
        for frames, rest, crops in images:
            n = sum(map(len, frames)) + len(rest)
            count = min(n, keep if isinstance(keep, int) else max(1, int(keep * n)))
            expected += slow(rows, frames, rest, crops, count)
        assert got[sample] == expected


@pytest.mark.parametrize("drop", [0.25, 0.5, 0.75])
def test_the_papers_ratio(drop):
    """Of groups of four, 1 - 3 K / 4 is all of the first and 1 - K of every other."""
    kept = DyCoke(1 - 3 * drop / 4).select(videos([VIDEO]))[0]
    part = 12 * (1 - drop)
    assert torch.bincount(kept // 12).tolist() == [12, part, part, part] * 2


def test_a_frame_unlike_its_own_before():
    """The third of a group is compared with the first, not with the second."""
    ctx = videos([[[(3, 4)] * 4]])
    hidden = torch.ones_like(ctx.hidden)
    hidden[0, 12:24] = -1
    hidden[0, 24 + 7] = -1
    assert DyCoke(12 + 3).select(replace(ctx, hidden=hidden))[0].tolist() == [*range(12), 12, 31, 36 + 7]


def test_a_broken_sample_changes_nothing_for_others():
    ctx = videos([VIDEO, VIDEO])
    hidden = ctx.hidden.clone()
    hidden[1] = float("nan")
    sound, got = DyCoke(0.475).select(ctx), DyCoke(0.475).select(replace(ctx, hidden=hidden))
    assert torch.equal(got[0], sound[0]) and (got[1] >= 0).all() and len(set(got[1].tolist())) == 45


def test_needs():
    assert (
        DyCoke().layers == (0,)
        and DyCoke().needs(0) == Needs(hidden=True)
        and DyCoke().kept(1000, 1, 0) == 475
    )
    packed = DyCoke(9, positions="pack").select(videos([VIDEO]))
    assert packed.positions == "pack" and packed.index.shape == (1, 9)


def test_missing_rows():
    with pytest.raises(
        ValueError, match=r"^ctx\.hidden: expected hidden states \(declare Needs\(hidden=True\)\), got None$"
    ):
        DyCoke().select(replace(videos([VIDEO]), hidden=None))


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, True])
def test_rejects(keep):
    with pytest.raises(ValueError, match=r"^keep: expected a share in \(0, 1\] or a whole number"):
        DyCoke(keep)
