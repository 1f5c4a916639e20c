"""GlobalCom2 against its formula: the tiles' budgets by the small view, and scores of both."""

from math import exp, floor, sqrt

import pytest

from helpers.contexts import images_in, kept_lists, sight, top
from helpers.tiles import image, images_with_first, left_over, newlines_of, share_slowly, tiled
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.globalcom2 import GlobalCom2

NEXT = [image(4), image(4, 2, 2)], [], [image(4, 1, 3, (1, 2, 2, 8))]
TILED = [
    pytest.param({"samples": [[image(4, 2, 2)]]}, id="one"),
    pytest.param({"samples": NEXT}, id="ragged"),
    pytest.param({"samples": NEXT, "few_values": True, "seed": 2, "H": 1}, id="ties"),
    pytest.param({"samples": NEXT, "cls": False, "seed": 3}, id="no-cls"),
    pytest.param({"samples": [[image(4, 2, 1), image(4, 1, 1)]], "seed": 4}, id="two"),
    pytest.param({"samples": [[image(5, 3, 1, (4, 1, 9, 3))], [image(5)]], "seed": 5}, id="cut"),
]


def budget_of(keep, tokens):
    return min(tokens, keep if isinstance(keep, int) else max(1, int(keep * tokens + 1e-6)))


def logits(ctx, crop):
    """Logits of the CLS row, or the mean over rows, mean over heads, in double precision."""
    seen = ctx.vision[-1]
    q, k = (t[crop].double() for t in (seen.query, seen.key))
    z = (q @ k.mT * seen.scale).mean(0)
    return [round(v, 9) for v in (z[0, 1:] if seen.cls else z.mean(0)).tolist()]


def bilinear(small, side, grid):
    """By two neighbours along each side, edges repeated."""
    rows, columns = grid

    def taps(i, n):
        place = min(max((i + 0.5) * side / n - 0.5, 0), side - 1)
        low = min(floor(place), side - 1)
        return low, min(low + 1, side - 1), place - low

    wide = {}
    for r in range(rows):
        for c in range(columns):
            (y, below, v), (x, right, u) = taps(r, rows), taps(c, columns)
            upper = small[y * side + x] * (1 - u) + small[y * side + right] * u
            lower = small[below * side + x] * (1 - u) + small[below * side + right] * u
            wide[r, c] = upper * (1 - v) + lower * v
    return wide


def unit(values):
    norm = sqrt(sum(v * v for v in values))
    return [v / norm if norm else 0.0 for v in values]


def budgets(ctx, cut, side, k, temperature):
    """What small view and tiles get."""
    small, sizes = logits(ctx, cut.crops[0]), [len(places) for places in cut.places]
    shown = {at: number for number, own in enumerate(cut.at) for at in own}
    sums = [0.0] * len(cut.at)
    for j, value in enumerate(small):
        r = int((j // side + 0.5) * cut.grid[0] / side + 1e-9)
        c = int((j % side + 0.5) * cut.grid[1] / side + 1e-9)
        sums[shown[r, c]] += value
    up = [exp((round(s, 7) - max(sums)) / temperature) for s in sums]
    sigma = [round(e / sum(up), 9) for e in up]
    ratio = min(1.0, k / sum(sizes))
    first = int(ratio * side**2 + 1e-6)
    wish = [min(ratio * n * (1 + s - 1 / len(sums)), n) for n, s in zip(sizes[1:], sigma, strict=True)]
    less = min(1.0, (k - first) / sum(wish))
    return left_over(k, [first, *(floor(w * less + 1e-6) for w in wish)], sizes, [-1.0, *sigma])


def slow(ctx, cuts, side, keep, alpha, temperature):
    """Per sample, what stays."""
    kept = [[] for _ in ctx.counts]
    for cut, first in images_with_first(cuts):
        k, sizes = budget_of(keep, cut.tokens), [len(places) for places in cut.places]
        scores = [logits(ctx, cut.crops[0])]
        if cut.at:
            grants, wide = budgets(ctx, cut, side, k, temperature), bilinear(scores[0], side, cut.grid)
            for crop, patches, at in zip(cut.crops[1:], cut.patches[1:], cut.at, strict=True):
                own = logits(ctx, crop)
                both = zip(unit([wide[rc] for rc in at]), unit([own[p] for p in patches]), strict=True)
                scores.append([round(alpha * g + (1 - alpha) * s, 6) for g, s in both])
        else:
            grants = share_slowly(k, sizes)
        for places, score, grant in zip(cut.places, scores, grants, strict=True):
            kept[cut.sample] += [places[j] for j in top(score, grant)]
        kept[cut.sample] += newlines_of(ctx, cut, first)[: k - sum(grants)]
    return [sorted(own) for own in kept]


@pytest.mark.parametrize("settings", TILED)
@pytest.mark.parametrize("keep", [1, 13, 0.2, 0.45, 0.9, 1.0])
def test_equals_the_formula_on_tiles(settings, keep):
    ctx, cuts = tiled(layers=(-1,), **settings)
    mixes = ((0.0, 1.0), (0.5, 10.0), (1.0, 0.2))
    # tiles' own scores tie exactly; mixed ones differ by rounding
    for alpha, temperature in mixes[: 1 if "few_values" in settings else 3]:
        got = GlobalCom2(keep, alpha, temperature, positions="pack").select(ctx)
        assert kept_lists(got.index) == slow(
            ctx, cuts, settings["samples"][0][0].side, keep, alpha, temperature
        )
        assert got == Reduction(got.index, None, "pack")


@pytest.mark.parametrize("settings", [{"images": ["tall", "none", ((3, 7), (7, 3))]}, {"cls": False}])
@pytest.mark.parametrize("keep", [1, 5, 0.25, 1.0])
def test_images_of_one_crop_keep_their_best(settings, keep):
    ctx = sight(layers=(-1,), **settings)
    got = kept_lists(GlobalCom2(keep).select(ctx))
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        for number, first, (r, c) in here:
            expected += [first + p for p in top(logits(ctx, number), budget_of(keep, r * c))]
        assert got[sample] == expected


def test_a_low_temperature_gives_one_tile_more():
    ctx, cuts = tiled([[image(4, 2, 2)]], layers=(-1,))
    counts = []
    for temperature in (0.01, 1e9):
        kept = {*kept_lists(GlobalCom2(20, temperature=temperature).select(ctx))[0]}
        counts.append([len(kept & {*places}) for places in cuts[0].places])
    assert counts[1] == [4, 4, 4, 4, 4] and max(counts[0][1:]) >= 7 and sum(counts[0]) == 20


def test_published_counts():
    ctx, _ = tiled([[image(24, 2, 2)]], layers=(-1,), H=1)
    assert GlobalCom2(640).select(ctx).shape == (1, 640)
    assert GlobalCom2().select(ctx).shape == (1, 732)


def test_no_images():
    assert GlobalCom2().select(sight(["none", "none"])).shape == (2, 0)


def test_needs():
    assert GlobalCom2().layers == (0,)
    assert GlobalCom2(vision_layer=-2).needs(0) == Needs(vision=(-2,))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"keep": 0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        ({"alpha": -0.1}, r"^alpha: expected a share in \[0, 1\], got -0\.1$"),
        ({"temperature": 0}, r"^temperature: expected a number > 0, got 0$"),
        ({"temperature": float("nan")}, r"^temperature: expected a number > 0, got nan$"),
        ({"vision_layer": True}, r"^vision_layer: expected a whole number, got True$"),
        ({"positions": None}, r"^positions: expected 'keep' or 'pack', got None$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        GlobalCom2(**settings)
