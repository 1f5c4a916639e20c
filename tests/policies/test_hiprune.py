"""HiPrune against its formula: anchors, the tokens around them, and registers."""

import pytest
import torch

from helpers.contexts import images_in, kept_lists, sight, top
from helpers.tiles import image, images_with_first, newlines_of, share_slowly, tiled
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.hiprune import HiPrune

BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square"], "few_values": True}, id="ties"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
]


def budget_of(keep, tokens):
    return min(tokens, keep if isinstance(keep, int) else max(1, int(keep * tokens + 1e-6)))


def received(ctx, layer, crop):
    """What each patch gets from all rows, CLS among them, in double precision."""
    seen = ctx.vision[layer]
    q, k = (t[crop].double() for t in (seen.query, seen.key))
    pays = torch.softmax(q @ k.mT * seen.scale, -1).mean((0, 1))
    return [round(p, 9) for p in pays[int(seen.cls) :].tolist()]


def chosen(middle, deep, grid, k, alpha):
    """Of one crop, by scores of its tokens."""
    rows, columns = grid
    anchors = top(middle, min(round(k * alpha / 5), k // 5))
    near = set()
    for j in anchors:
        r, c = divmod(j, columns)
        for y, x in ((r, c), (r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            if 0 <= y < rows and 0 <= x < columns:
                near.add(y * columns + x)
    others = [j for j in range(rows * columns) if j not in near]
    return [*near, *(others[i] for i in top([deep[j] for j in others], k - len(near)))]


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("keep", [1, 5, 13, 0.25, 1.0, 100])
def test_equals_the_formula(settings, keep):
    ctx = sight(layers=(8, -2), **settings)
    for alpha in (0.1, 0.0, 0.6, 1.0):
        got = HiPrune(keep, alpha, positions="pack").select(ctx)
        for sample, here in enumerate(images_in(ctx)):
            expected = []
            for number, first, grid in here:
                scores = (received(ctx, layer, number) for layer in (8, -2))
                budget = budget_of(keep, grid[0] * grid[1])
                expected += [first + j for j in chosen(*scores, grid, budget, alpha)]
            assert kept_lists(got.index)[sample] == sorted(expected)
        assert got == Reduction(got.index, None, "pack")


@pytest.mark.parametrize("keep", [1, 13, 40, 0.3, 1.0])
def test_tiles_share_evenly_and_are_chosen_from_alone(keep):
    ctx, cuts = tiled([[image(4), image(4, 2, 2)], [image(4, 1, 3, (1, 2, 2, 8))]], layers=(8, -2))
    expected = [[], []]
    for cut, first in images_with_first(cuts):
        k, sizes = budget_of(keep, cut.tokens), [len(places) for places in cut.places]
        grants = share_slowly(k, sizes)
        shapes = [(4, 4), *((len({r for r, _ in at}), len({c for _, c in at})) for at in cut.at)]
        for crop, places, patches, grid, grant in zip(
            cut.crops, cut.places, cut.patches, shapes, grants, strict=True
        ):
            middle, deep = ([received(ctx, layer, crop)[p] for p in patches] for layer in (8, -2))
            expected[cut.sample] += [places[j] for j in chosen(middle, deep, grid, grant, 0.9)]
        expected[cut.sample] += newlines_of(ctx, cut, first)[: k - sum(grants)]
    assert kept_lists(HiPrune(keep, 0.9).select(ctx)) == [sorted(own) for own in expected]


@pytest.mark.parametrize("keep", [192, 128, 64, 0.25])
def test_published_counts(keep):
    ctx = sight([((24, 24),)], layers=(8, -2))
    assert HiPrune(keep).select(ctx).shape == (1, 144 if keep == 0.25 else keep)


def test_no_images():
    assert HiPrune().select(sight(["none", "none"])).shape == (2, 0)


def test_needs():
    assert HiPrune().layers == (0,)
    assert HiPrune().needs(0) == Needs(vision=(-2, 8))
    assert HiPrune(object_layer=3, vision_layer=3).needs(0) == Needs(vision=(3,))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"keep": 0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        ({"alpha": 1.5}, r"^alpha: expected a share in \[0, 1\], got 1\.5$"),
        ({"object_layer": 0.5}, r"^object_layer: expected a whole number, got 0\.5$"),
        ({"vision_layer": True}, r"^vision_layer: expected a whole number, got True$"),
        ({"positions": None}, r"^positions: expected 'keep' or 'pack', got None$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        HiPrune(**settings)
