"""Which images are a small view and tiles, what of the small view a tile shows, and parts of a whole."""

from dataclasses import replace

import pytest
import torch

from helpers.contexts import sight
from helpers.tiles import image, tiled
from vlmprune.policies.base import Crop
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.tiles import Tiled, areas, by_weight, over_areas, seats, tiled_images

CPU = torch.device("cpu")


def found(ctx):
    return tiled_images(ctx, crops_of(ctx))


def test_small_view_and_tiles():
    ctx, _ = tiled([[image(4), image(4, 2, 2)], [image(4, 1, 3, (1, 2, 2, 8))], []])
    parts = ((0, 0, 4, 4), (0, 4, 4, 4), (4, 0, 4, 4), (4, 4, 4, 4))
    cut = ((0, 0, 2, 2), (0, 2, 2, 4), (0, 6, 2, 2))
    assert found(ctx) == (None, Tiled(1, (4, 4), (8, 8), parts), Tiled(6, (4, 4), (2, 8), cut))
    assert found(ctx)[2].sizes == (4, 8, 4) and found(ctx)[2].tokens == 16


def test_one_tile_is_told_by_its_newlines():
    ctx, _ = tiled([[image(4, 1, 1)]])
    assert found(ctx) == (Tiled(0, (4, 4), (4, 4), ((0, 0, 4, 4),)),)


def test_frames_and_images_of_one_crop_have_none():
    ctx = sight([((4, 5),), ((4, 5), (4, 5), (4, 5))])
    assert found(ctx) == (None,) * 4
    video = replace(ctx, sizes=((20,), (60,)))
    assert found(video) == (None, None)
    as_crops = ((Crop(0, 5, 4, 5),),), ((Crop(0, 5, 4, 5), Crop(20, 5, 4, 5), Crop(40, 5, 4, 5)),)
    assert found(replace(video, crops=as_crops)) == (None, None)


def test_a_small_view_elsewhere_is_refused():
    ctx = sight([((4, 5),)] * 3)
    tiles_first = (Crop(0, 11, 4, 5), Crop(5, 11, 4, 5), Crop(44, 5, 4, 5))
    order = torch.arange(64)[None]
    last = replace(
        ctx,
        mask=order >= 0,
        counts=(64,),
        ordinals=order,
        grids=(((4, 11), (4, 5)),),
        sizes=((64,),),
        crops=((tiles_first,),),
    )
    with pytest.raises(
        ValueError, match=r"^ctx\.crops: expected an image's small view before the tiles of one grid, got \["
    ):
        found(last)


@pytest.mark.parametrize(
    "shape", [(4, 2, 2, None), (5, 2, 3, None), (5, 3, 1, (4, 1, 9, 3)), (4, 1, 3, (1, 3, 2, 7))]
)
def test_areas_and_seats(shape):
    side, down, across, box = shape
    ctx, cuts = tiled([[image(side, down, across, box)]])
    tile, cut = found(ctx)[0], cuts[0]
    rows, columns = cut.grid
    shown = {at: number for number, own in enumerate(cut.at) for at in own}
    expected = [
        shown[int((y + 0.5) * rows / side + 1e-9), int((x + 0.5) * columns / side + 1e-9)]
        for y in range(side)
        for x in range(side)
    ]
    assert areas(tile, CPU).tolist() == expected
    small = torch.randn(side**2, generator=torch.Generator().manual_seed(3))
    sums = [
        sum(v for v, own in zip(small.tolist(), expected, strict=True) if own == j)
        for j in range(len(cut.at))
    ]
    assert over_areas(small, tile).tolist() == pytest.approx(sums)
    for line, at in zip(seats(tile, side**2, CPU).tolist(), cut.at, strict=True):
        assert line == [r * columns + c for r, c in at] + [-1] * (side**2 - len(at))


def test_parts_of_a_whole_are_rounded_down():
    assert by_weight(torch.tensor([1.0, 2, 4]), 10).tolist() == [1, 2, 5]
    assert by_weight(torch.tensor([0.1, 0.1, 0.1]), 30).tolist() == [10, 10, 10]
    assert by_weight(torch.tensor([float("nan"), 1, float("inf")]), 5).tolist() == [0, 5, 0]
    assert by_weight(torch.zeros(2), 7).tolist() == [0, 0]
