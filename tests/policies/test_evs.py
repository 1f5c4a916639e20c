"""EVS against loops over frames and places: first frames, then what changed most, counted over the whole video."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.contexts import kept_lists
from helpers.videos import NEWLINE, frames_of_images, videos
from vlmprune.policies.base import Needs
from vlmprune.policies.methods.evs import EVS
from vlmprune.policies.parts.lattice import lattice

VIDEO = [[(3, 4)] * 6]
BATCHES = [
    pytest.param([VIDEO], {}, id="one"),
    pytest.param([[[(3, 4)] * 5 + [NEWLINE], [(2, 2)] * 3], [], [[(4, 3)] * 2]], {}, id="ragged"),
    pytest.param([VIDEO, VIDEO], {"few_values": True}, id="ties"),
    pytest.param([[[(3, 3), (2, 4), (2, 4), (2, 4)], [(4, 4)]]], {}, id="other-shapes"),
]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        sum(x * x for x in a) * sum(y * y for y in b)
    )


def slow(rows, frames, rest, crops, keep):
    """Places of one image that stay."""
    firsts, scores = [], {}
    for t, places in enumerate(frames):
        if t == 0 or (crops[t].rows, crops[t].columns) != (crops[t - 1].rows, crops[t - 1].columns):
            firsts.append(t)
            continue
        for place, before in zip(places, frames[t - 1], strict=True):
            scores[place] = 1 - round(cosine(rows[place], rows[before]), 6)
    share = dict.fromkeys(firsts, 0)
    for _ in range(keep):  # one by one, so that they share evenly
        open_ones = [t for t in firsts if share[t] < len(frames[t])]
        if open_ones:
            share[min(open_ones, key=lambda t: share[t])] += 1
    kept = [frames[t][p] for t in firsts for p in lattice((crops[t].rows, crops[t].columns), share[t])]
    changed = sorted(scores, key=lambda place: (-scores[place], place))
    return sorted((kept + changed + rest)[:keep])


@pytest.mark.parametrize("samples, settings", BATCHES)
@pytest.mark.parametrize("keep", [1, 5, 12, 20, 0.25, 0.6, 1.0])
def test_equals_the_formula(samples, settings, keep):
    ctx = videos(samples, **settings)
    got = kept_lists(EVS(keep).select(ctx))
    for sample, images in enumerate(frames_of_images(ctx)):
        expected, rows = [], ctx.hidden[sample].double().tolist()
        for frames, rest, crops in images:
            n = sum(map(len, frames)) + len(rest)
            expected += slow(
                rows, frames, rest, crops, min(n, keep if isinstance(keep, int) else max(1, int(keep * n)))
            )
        assert got[sample] == expected


def test_what_stands_still_goes():
    """Of two equal frames the second one goes, but for the token that changed."""
    ctx = videos([[[(3, 4)] * 2]])
    ctx.hidden[0, 12:] = ctx.hidden[0, :12] * 2  # a cosine of 1
    ctx.hidden[0, 17] = -ctx.hidden[0, 5]
    assert EVS(13).select(ctx).tolist() == [[*range(12), 17]]


def test_a_small_budget_is_spread_over_the_first_frame():
    ctx = videos([[[(4, 4)] * 3]])
    assert EVS(4).select(ctx).tolist() == [list(lattice((4, 4), 4))]


def test_packed():
    ctx = videos([VIDEO])
    packed = EVS(15, positions="pack").select(ctx)
    assert packed.positions == "pack" and torch.equal(packed.index, EVS(15).select(ctx))


def test_a_broken_sample_changes_nothing_for_others():
    ctx = videos([VIDEO, VIDEO])
    hidden = ctx.hidden.clone()
    hidden[1] = float("nan")
    sound, got = EVS(20).select(ctx), EVS(20).select(replace(ctx, hidden=hidden))
    assert torch.equal(got[0], sound[0]) and got[1].tolist() == list(range(20))


def test_needs():
    assert EVS().layers == (0,) and EVS().needs(0) == Needs(hidden=True) and EVS().kept(1000, 1, 0) == 250


def test_missing_rows():
    with pytest.raises(
        ValueError, match=r"^ctx\.hidden: expected hidden states \(declare Needs\(hidden=True\)\), got None$"
    ):
        EVS().select(replace(videos([VIDEO]), hidden=None))


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, True, "half"])
def test_rejects(keep):
    with pytest.raises(ValueError, match=r"^keep: expected a share in \(0, 1\] or a whole number"):
        EVS(keep)
