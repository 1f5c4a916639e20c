"""The oracle keeps the true box, counts like uniform, and is refused where it cannot be told the place."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmprune.errors import ModelError
from vlmprune.eval.oracle import Oracle, check_oracle, patches_in
from vlmprune.eval.questions import Question
from vlmprune.policies import TokenContext, Uniform

GRID = (4, 6)


def context(*counts, grids=None):
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    ordinals = torch.where(mask, torch.arange(max(counts)), -1)
    grids = grids or tuple(((4, n // 4),) for n in counts)
    return TokenContext(2, mask, counts, ordinals, ordinals, grids)


def kept(policy, ctx):
    return [[i for i in row if i >= 0] for row in policy.select(ctx).tolist()]


@pytest.mark.parametrize(
    "region, patches",
    [
        ((0, 0, 1, 1), list(range(24))),
        ((1 / 6, 0.25, 0.5, 0.5), [7, 8]),  # ends on the patches' edges
        ((1 / 6 - 0.01, 0.25, 0.5, 0.51), [6, 7, 8, 12, 13, 14]),
        ((0.9, 0.9, 0.91, 0.91), [23]),
    ],
)
def test_patches_that_a_region_touches(region, patches):
    assert patches_in(region, GRID) == patches


def test_every_sample_keeps_its_own_box_and_as_many_as_uniform():
    regions = ((0, 0, 0.3, 0.5), None, (0.5, 0.5, 1, 0.75))
    ctx = context(24, 24, 20)
    rows = kept(Oracle(layer=2, keep=0.4, regions=regions), ctx)
    uniform = kept(Uniform(layer=2, keep=0.4), ctx)
    assert [len(row) for row in rows] == [len(row) for row in uniform] == [9, 9, 8]
    assert {0, 1, 6, 7} <= set(rows[0]) and {12, 13, 14} <= set(rows[2])
    assert rows[1] == uniform[1]  # no box: the same tokens
    for row in rows:
        assert row == sorted(set(row))


def test_the_rest_is_evenly_spaced_over_the_other_patches():
    (row,) = kept(Oracle(keep=6, regions=((0, 0, 1 / 6, 1),), order="raster"), context(24))
    others = [i for i in range(24) if i % 6]
    assert row == sorted([0, 6, 12, 18, others[5], others[15]])


def test_a_box_larger_than_the_budget_is_thinned_evenly():
    (row,) = kept(Oracle(keep=4, regions=((0, 0, 1, 0.5),), order="raster"), context(24))
    assert row == [1, 4, 7, 10]


def test_the_rest_is_spread_in_two_dimensions():
    """16 of 12 x 12, the left sixth known: more of it than may stay, or all of it and a lattice of the others."""
    left = [i for i in range(144) if i % 12 < 2]
    told = ((0, 0, 1 / 6, 1),)
    (row,) = kept(Oracle(keep=16, regions=told), context(144, grids=(((12, 12),),)))
    assert set(row) <= set(left) and {i // 12 // 3 for i in row} == {0, 1, 2, 3}
    (row,) = kept(Oracle(keep=44, regions=told), context(144, grids=(((12, 12),),)))
    others = [i for i in row if i not in left]
    assert set(left) <= set(row) and len(others) == 20
    quarters = [(i // 12 >= 6, i % 12 >= 7) for i in others]
    assert all(3 <= quarters.count((down, right)) <= 7 for down in (0, 1) for right in (0, 1))


@pytest.mark.parametrize("order", ["lattice", "raster"])
def test_without_regions_it_is_uniform(order):
    ctx = context(24, 16)
    assert kept(Oracle(keep=0.3, order=order), ctx) == kept(Uniform(keep=0.3, order=order), ctx)


@pytest.mark.parametrize(
    "regions, grids, said",
    [
        ((None,), None, r"^regions: expected 2, one per sample, got 1$"),
        (
            ((0, 0, 1, 1),) * 2,
            (((2, 6), (2, 6)),) * 2,
            r"^regions: expected samples of one image with one grid, all of it",
        ),
    ],
)
def test_regions_that_do_not_fit(regions, grids, said):
    with pytest.raises(ValueError, match=said):
        Oracle(regions=regions).select(context(24, 24, grids=grids))


@dataclass
class Crop:
    crop_size: dict
    size: dict
    do_center_crop: bool = True
    do_pad: bool = False


SQUARE = {"height": 8, "width": 8}
LLAVA = SimpleNamespace(
    model_type="llava", vision_config=SimpleNamespace(image_size=8, patch_size=4), image_seq_length=4
)


def check(size, image_processor, config=LLAVA, box=(0, 0, 1, 1)):
    question = Question("7", Path("a.png"), "box", "?", "!", box, size)
    check_oracle([question], config, SimpleNamespace(image_processor=image_processor))


@pytest.mark.parametrize(
    "size, image_processor",
    [
        ((9, 9), Crop(SQUARE, {"shortest_edge": 8})),
        ((9, 5), Crop(SQUARE, SQUARE)),
        ((9, 5), Crop(SQUARE, {"shortest_edge": 8}, do_center_crop=False)),
        ((9, 5), SimpleNamespace(size=SQUARE, do_pad=False, do_center_crop=False)),
    ],
)
def test_images_shown_whole(size, image_processor):
    check(size, image_processor)


@pytest.mark.parametrize("size, edge", [((9, 5), 8), ((9, 9), 10)])
def test_cropped_images_are_refused(size, edge):
    said = r"^oracle: expected images that the processor shows whole .*, got 9 x \d in question '7'$"
    with pytest.raises(ValueError, match=said):
        check(size, Crop(SQUARE, {"shortest_edge": edge}))


def test_padded_images_are_refused_unless_square():
    pads = SimpleNamespace(size=SQUARE, do_pad=True, do_center_crop=False)
    check((9, 9), pads)
    with pytest.raises(ValueError, match=r"^oracle: expected images that the processor shows whole .*9 x 5"):
        check((9, 5), pads)


@pytest.mark.parametrize("box", [(9, 0, 20, 2), (3, 1, 2, 2), (0.1, 0.1, 0.5, 0.5)])
def test_boxes_that_show_nothing(box):
    said = r"^question '7': expected a box x1 y1 x2 y2 of a pixel or more within 9 x 9 pixels, got \("
    with pytest.raises(ValueError, match=said):
        check((9, 9), Crop(SQUARE, SQUARE), box=box)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match=r"^oracle: expected questions with a box, got none$"):
        check((9, 9), Crop(SQUARE, SQUARE), box=None)
    with pytest.raises(
        ModelError, match=r"^model: expected a family whose images share one grid, got 'qwen2_vl'$"
    ):
        check((9, 9), Crop(SQUARE, SQUARE), config=SimpleNamespace(model_type="qwen2_vl"))
