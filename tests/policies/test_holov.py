"""HoloV against its formula: quotas of the raster's runs, and the most attended tokens of each."""

from math import floor, frexp, ldexp, sqrt

import pytest

from helpers.contexts import images_in, kept_lists, patch_scores, sight, top
from helpers.tiles import image, images_with_first, left_over, newlines_of, tiled
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.holov import HoloV

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
]


def budget_of(keep, tokens):
    return min(tokens, keep if isinstance(keep, int) else max(1, int(keep * tokens + 1e-6)))


def score_of(rows, attention, diversity):
    """Of one run, in double precision."""
    m = len(rows)
    unit = [[v / (sqrt(sum(u * u for u in row)) + 1e-6) for v in row] for row in rows]
    spread = []
    for i in range(m):
        alike = [
            0.0 if i == j else sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for j in range(m)
        ]
        mean = sum(alike) / max(m - 1, 1)
        spread.append(sum((c - mean) ** 2 for c in alike) / max(m - 1, 1))
    paid = [1e3 * a for a in attention]
    scaling = (sum(paid) / m) / (sum(spread) / m + 1e-6)
    return sum(a + diversity * d * scaling for a, d in zip(paid, spread, strict=True)) / m


def to_16_bits(x):
    """What float32 sums cannot tell apart is a tie."""
    whole, power = frexp(x)
    return ldexp(round(whole * 65536) / 65536, power)


def chosen(places, attention, hidden, k, wanted, diversity):
    """Of one image: its tokens' places in raster order, their attention, rows by place, and how many stay."""
    count = min(wanted or max(1, int(1024 / 576 * len(places) / k)), len(places))
    sizes = [len(places) // count + (r < len(places) % count) for r in range(count)]
    runs, at = [], 0
    for size in sizes:
        runs.append(range(at, at + size))
        at += size
    weights = [
        to_16_bits(score_of([hidden[places[j]] for j in run], [attention[j] for j in run], diversity))
        for run in runs
    ]
    quotas = [floor(k * w / sum(weights) + 1e-6) for w in weights]
    kept = []
    for run, quota in zip(runs, left_over(k, quotas, sizes, weights), strict=True):
        kept += [places[run[j]] for j in top([attention[j] for j in run], quota)]
    return kept


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("keep", [1, 5, 9, 0.25, 1.0, 100])
@pytest.mark.parametrize("runs", [16, 3, 1, None])
def test_equals_the_formula(settings, keep, runs):
    ctx = sight(**settings)
    for diversity in (0.09, 0.0, 30.0):
        got = HoloV(keep, runs, diversity, positions="pack").select(ctx)
        for sample, here in enumerate(images_in(ctx)):
            expected = []
            for number, first, (r, c) in here:
                places = list(range(first, first + r * c))
                budget, rows = budget_of(keep, r * c), ctx.hidden[sample].tolist()
                expected += chosen(places, patch_scores(ctx, -2, number), rows, budget, runs, diversity)
            assert kept_lists(got.index)[sample] == sorted(expected)
        assert got == Reduction(got.index, None, "pack")


@pytest.mark.parametrize("keep", [1, 13, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("runs", [16, 4, None])
def test_small_view_and_tiles_are_one_raster_without_newlines(keep, runs):
    ctx, cuts = tiled([[image(4), image(4, 2, 2)], [image(4, 1, 3, (1, 2, 2, 8))]])
    expected = [[], []]
    for cut, first in images_with_first(cuts):
        attention = {}
        for crop, places, patches in zip(cut.crops, cut.places, cut.patches, strict=True):
            score = patch_scores(ctx, -2, crop)
            attention |= {place: score[p] for place, p in zip(places, patches, strict=True)}
        places, k = sorted(attention), budget_of(keep, cut.tokens)
        rows = ctx.hidden[cut.sample].tolist()
        kept = chosen(places, [attention[p] for p in places], rows, min(k, len(places)), runs, 0.09)
        expected[cut.sample] += kept + newlines_of(ctx, cut, first)[: k - len(kept)]
    assert kept_lists(HoloV(keep, runs).select(ctx)) == [sorted(own) for own in expected]


def test_what_a_full_run_cannot_take_goes_to_the_others():
    ctx = sight([((1, 8),)])
    for keep in range(1, 9):
        assert len({*HoloV(keep, 4).select(ctx)[0].tolist()}) == keep


@pytest.mark.parametrize("keep", [192, 128, 64, 0.25])
def test_published_counts(keep):
    assert HoloV(keep).select(sight([((24, 24),)])).shape == (1, 144 if keep == 0.25 else keep)


def test_no_images():
    assert HoloV().select(sight(["none", "none"])).shape == (2, 0)


def test_needs():
    assert HoloV().layers == (0,)
    assert HoloV(vision_layer=-1).needs(0) == Needs(hidden=True, vision=(-1,))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"keep": 0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        ({"runs": 0}, r"^runs: expected a whole number >= 1, got 0$"),
        ({"diversity": -1}, r"^diversity: expected a number >= 0, got -1$"),
        ({"vision_layer": True}, r"^vision_layer: expected a whole number, got True$"),
        ({"positions": None}, r"^positions: expected 'keep' or 'pack', got None$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        HoloV(**settings)
