"""HiRED against its formula: budgets of small view and tiles, and the best of each."""

from math import floor

import pytest
import torch

from helpers.contexts import images_in, kept_lists, patch_scores, sight, top
from helpers.tiles import image, images_with_first, left_over, newlines_of, share_slowly, tiled
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.hired import HiRED

NEXT = [image(4), image(4, 2, 2)], [], [image(4, 1, 3, (1, 2, 2, 8))]
TILED = [
    pytest.param({"samples": [[image(4, 2, 2)]]}, id="one"),
    pytest.param({"samples": NEXT}, id="ragged"),
    pytest.param({"samples": NEXT, "few_values": True, "seed": 2}, id="ties"),
    pytest.param({"samples": NEXT, "cls": False, "seed": 3}, id="no-cls"),
    pytest.param({"samples": [[image(4, 2, 1), image(4, 1, 1)]], "seed": 4}, id="two"),
    pytest.param({"samples": [[image(5, 3, 1, (4, 1, 9, 3))], [image(5)]], "seed": 5}, id="cut"),
]


def budget_of(keep, tokens):
    return min(tokens, keep if isinstance(keep, int) else max(1, int(keep * tokens + 1e-6)))


def content_of(early, cut, side, alpha, content):
    """What each tile shows, by the small view's early scores."""
    if content == "runs":
        best = sorted(range(side**2), key=lambda j: (-early[j], j))[: int(side**2 * (1 - alpha) + 1e-6)]
        return [sum(j * len(cut.at) // side**2 == tile for j in best) for tile in range(len(cut.at))]
    shown = {at: number for number, own in enumerate(cut.at) for at in own}
    sums = [0.0] * len(cut.at)
    for j, value in enumerate(early):
        r = int((j // side + 0.5) * cut.grid[0] / side + 1e-9)
        c = int((j % side + 0.5) * cut.grid[1] / side + 1e-9)
        sums[shown[r, c]] += value
    return [round(s, 9) for s in sums]


def slow(ctx, cuts, side, keep, alpha, content):
    """Per sample, what stays."""
    kept = [[] for _ in ctx.counts]
    for cut, first in images_with_first(cuts):
        k, sizes = budget_of(keep, cut.tokens), [len(places) for places in cut.places]
        if cut.at:
            shown = content_of(patch_scores(ctx, 0, cut.crops[0]), cut, side, alpha, content)
            own = min(int(alpha * k + 1e-6), sizes[0])
            parts = [floor((k - own) * c / sum(shown) + 1e-6) if sum(shown) else 0 for c in shown]
            grants = left_over(k, [own, *parts], sizes, [-1.0, *shown])
        else:
            grants = share_slowly(k, sizes)
        for crop, places, patches, grant in zip(cut.crops, cut.places, cut.patches, grants, strict=True):
            score = patch_scores(ctx, -2, crop)
            kept[cut.sample] += [places[j] for j in top([score[p] for p in patches], grant)]
        kept[cut.sample] += newlines_of(ctx, cut, first)[: k - sum(grants)]
    return [sorted(own) for own in kept]


@pytest.mark.parametrize("settings", TILED)
@pytest.mark.parametrize("keep", [1, 13, 0.2, 0.45, 0.9, 1.0])
@pytest.mark.parametrize("content", ["area", "runs"])
def test_equals_the_formula_on_tiles(settings, keep, content):
    ctx, cuts = tiled(layers=(0, -2), **settings)
    for alpha in (0.5, 0.0, 0.8, 1.0):
        got = HiRED(keep, alpha, content=content, positions="pack").select(ctx)
        assert kept_lists(got.index) == slow(ctx, cuts, settings["samples"][0][0].side, keep, alpha, content)
        assert got == Reduction(got.index, None, "pack")


@pytest.mark.parametrize("settings", [{"images": ["tall", "none", ((3, 7), (7, 3))]}, {"cls": False}])
@pytest.mark.parametrize("keep", [1, 5, 0.25, 1.0])
def test_images_of_one_crop_keep_their_best(settings, keep):
    ctx = sight(layers=(0, -2), **settings)
    got = kept_lists(HiRED(keep).select(ctx))
    for sample, here in enumerate(images_in(ctx)):
        expected = []
        for number, first, (r, c) in here:
            expected += [first + p for p in top(patch_scores(ctx, -2, number), budget_of(keep, r * c))]
        assert got[sample] == expected


def test_the_small_view_gets_alpha():
    ctx, cuts = tiled([[image(4, 2, 2)]], layers=(0, -2))
    for alpha, own in ((0.0, 0), (0.25, 5), (0.5, 10), (1.0, 16)):
        kept = kept_lists(HiRED(20, alpha).select(ctx))[0]
        assert len(kept) == 20 and len({*kept} & {*cuts[0].places[0]}) == own


def test_tokens_put_behind_all_others_leave_the_budgets_as_they_are():
    ctx, cuts = tiled([[image(4, 2, 2)]], layers=(0, -2))
    ranking = HiRED(20).rank(ctx)
    kept = ranking.index(ctx)
    last = torch.zeros_like(ctx.mask).scatter(1, kept[:, ::2], True)
    other = ranking.behind(last).index(ctx)
    assert not last.gather(1, other).any()
    counts = [[len({*index[0].tolist()} & {*places}) for places in cuts[0].places] for index in (kept, other)]
    assert counts[0] == counts[1]


def test_published_counts():
    ctx, _ = tiled([[image(24, 2, 2)]], layers=(0, -2), H=1)
    assert HiRED(640).select(ctx).shape == (1, 640)
    assert HiRED().select(ctx).shape == (1, 585)  # a fifth of 2928, newlines among them


def test_no_images():
    assert HiRED().select(sight(["none", "none"])).shape == (2, 0)


def test_needs():
    assert HiRED().layers == (0,)
    assert HiRED().needs(0) == Needs(vision=(-2, 0))
    assert HiRED(early_layer=3, vision_layer=3).needs(0) == Needs(vision=(3,))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"keep": 0},
            r"^keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        ({"alpha": 1.5}, r"^alpha: expected a share in \[0, 1\], got 1\.5$"),
        ({"early_layer": 0.5}, r"^early_layer: expected a whole number, got 0\.5$"),
        ({"vision_layer": True}, r"^vision_layer: expected a whole number, got True$"),
        ({"content": "tiles"}, r"^content: expected 'area' or 'runs', got 'tiles'$"),
        ({"positions": None}, r"^positions: expected 'keep' or 'pack', got None$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        HiRED(**settings)
