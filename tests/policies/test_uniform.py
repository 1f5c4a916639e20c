"""The uniform baseline: the lattice by its properties, the raster rule and the grid against their definitions."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.contexts import case, kept_lists
from vlmprune.policies import Uniform
from vlmprune.policies.parts.lattice import lattice, lattice_scores

GRIDS = [(24, 24), (14, 14), (5, 7), (7, 5), (2, 60), (24, 25), (27, 27)]


def gap(grid, kept):
    """The largest distance of any cell to the nearest kept one."""
    cells = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()
    return float(torch.cdist(cells, cells[kept]).amin(1).max())


@pytest.mark.parametrize("grid", GRIDS)
def test_lattice_covers_the_image_for_every_count(grid):
    """k cells of a square lattice leave gaps of sqrt(N / 2k). Half a cell is what rounding to whole cells takes."""
    N = grid[0] * grid[1]
    for k in range(1, N + 1):
        kept = lattice(grid, k)
        assert len(set(kept)) == k and kept == tuple(sorted(kept))
        # Where a grid is narrower than the spacing, tokens can only stand in one line along it.
        least = max(math.sqrt(N / k / 2), max(grid) / k / 2)
        assert gap(grid, list(kept)) + 0.5 <= 1.4 * (least + 0.5)


@pytest.mark.parametrize("grid", GRIDS[:4])
def test_every_band_of_rows_and_columns_gets_its_share(grid):
    """Of any rows or columns next to one another: as many tokens as their part of the image, but for a line or so."""
    N = grid[0] * grid[1]
    for k in range(1, N + 1):
        kept = torch.tensor(lattice(grid, k))
        for size, at in zip(grid, (kept // grid[1], kept % grid[1]), strict=True):
            above = torch.cat([torch.zeros(1), at.bincount(minlength=size).cumsum(0)])
            surplus = (
                above - k * torch.arange(size + 1) / size
            )  # of the first rows; a band's is the difference of two
            line = N / size / math.sqrt(N / k) + 1
            assert surplus.max() - surplus.min() <= 1.5 * line + 1


@pytest.mark.parametrize("k", [1, 2, 10, 17, 96, 144, 195, 196])
def test_a_whole_image_keeps_its_lattice(k):
    (kept,) = kept_lists(Uniform(keep=k).select(case([((14, 14),)]).ctx))
    assert tuple(kept) == lattice((14, 14), k)


def test_what_raster_order_does_to_96_of_576():
    """Four columns of it, with five between them."""
    ctx = case([((24, 24),)]).ctx
    (even,), (raster,) = (kept_lists(Uniform(keep=96, order=o).select(ctx)) for o in ("lattice", "raster"))
    assert len({i % 24 for i in raster}) == 4 and gap((24, 24), raster) == 3.0
    assert len({i % 24 for i in even}) >= 8 and len({i // 24 for i in even}) >= 8
    assert gap((24, 24), even) == pytest.approx(math.sqrt(2))


def test_lattice_by_hand():
    assert lattice((4, 4), 8) == (1, 3, 4, 6, 9, 11, 12, 14)  # a chessboard
    assert lattice((4, 6), 6) == (1, 5, 9, 14, 18, 22)  # every fourth, every other row shifted by two
    assert lattice((6, 4), 6) == (3, 4, 10, 13, 19, 20)  # the same on its side
    assert lattice((3, 3), 1) == (4,)
    assert lattice((2, 2), 4) == (0, 1, 2, 3)
    assert lattice((5, 7), 0) == ()


@pytest.mark.parametrize("keep", [0.1, 0.25, 3, 11])
def test_every_image_gets_its_part_of_the_lattice(keep):
    """Two images of unequal size and, beside them, one with its newline column, each as if it were alone."""
    grids = ((8, 12), (6, 4)), ((9, 10),)
    ctx = case(grids).ctx
    for row, some, n in zip(kept_lists(Uniform(keep=keep).select(ctx)), grids, ctx.counts, strict=True):
        k = int(keep * n + 1e-6) if isinstance(keep, float) else keep * len(some)
        assert len(row) == k
        first = 0
        for grid in some:
            here = [i - first for i in row if first <= i < first + grid[0] * grid[1]]
            assert abs(len(here) - k * grid[0] * grid[1] / n) < 1
            assert tuple(here) == lattice(grid, len(here))
            first += grid[0] * grid[1]


def test_lattice_among_what_an_earlier_stage_left():
    """The lower half and a few: the lattice's density there is what it would be if all were there."""
    left = [3, 30, *range(288, 576)]
    ctx = case([((24, 24),)], kept=[left]).ctx
    (row,) = kept_lists(Uniform(keep=48).select(ctx))
    kept = [left[i] for i in row]
    assert len(kept) == 48
    below = [i - 288 for i in kept if i >= 288]
    assert len(below) >= 46 and gap((12, 24), below) <= 3.0
    thirds = [sum(i % 24 // 8 == third for i in kept) for third in range(3)]
    assert min(thirds) >= 14
    everything = kept_lists(Uniform(keep=290).select(ctx))
    assert everything == [[*range(290)]]


def test_lattice_of_a_rearranged_sample():
    """Tokens are told apart by their ordinals, wherever they stand."""
    ctx = case([((6, 6),)]).ctx
    back = replace(ctx, ordinals=ctx.ordinals.flip(1), ordered=False)
    (row,), (other,) = (kept_lists(Uniform(keep=7).select(c)) for c in (ctx, back))
    assert sorted(35 - i for i in other) == row


def test_lattice_of_a_part_of_a_prompt():
    """Chunked prefill: half of an image, then the other, together spread like a whole."""
    ctx = case([((8, 8),)]).ctx
    kept = []
    for first in (0, 32):
        cut = {name: getattr(ctx, name)[:, first : first + 32] for name in ("mask", "ordinals", "positions")}
        part = replace(ctx, **cut, counts=(32,), shares=(0.5,))
        kept += [first + i for i in kept_lists(Uniform(keep=16).select(part))[0]]
    assert len(kept) == 16 and tuple(kept) == lattice((8, 8), 16)


def test_lattice_never_waits_for_the_device():
    """Meta tensors hold no values: reading one on the host would raise."""
    ctx = case(["two", "none", "tall"]).ctx
    there = {name: getattr(ctx, name).to("meta") for name in ("mask", "ordinals", "positions")}
    assert lattice_scores(replace(ctx, **there), (4, 0, 2)).shape == ctx.mask.shape


@pytest.mark.parametrize("images", [["square"], ["two", "none", "tall"], [((24, 24),)]])
@pytest.mark.parametrize("keep", [0.25, 0.3, 0.999, 1.0, 1, 7, 1000])
def test_raster_order(images, keep):
    ctx = case(images).ctx
    got = kept_lists(Uniform(keep=keep, order="raster").select(ctx))
    for sample, n in enumerate(ctx.counts):
        k = (
            max(1, int(keep * n + 1e-6))
            if isinstance(keep, float)
            else keep * len(images and ctx.grids[sample])
        )
        k = min(n, k)
        assert got[sample] == [int((i + 0.5) * n / k) for i in range(k)]


def test_the_middle_of_equal_parts():
    assert kept_lists(Uniform(keep=4, order="raster").select(case([((2, 6),)]).ctx)) == [[1, 4, 7, 10]]


def test_grid_of_every_image():
    """4 x 5 and 5 x 3 patches, stride 2."""
    expected = [0, 2, 4, 10, 12, 14, 20, 22, 26, 28, 32, 34]
    assert kept_lists(Uniform(stride=2).select(case(["two"]).ctx)) == [expected]


def test_grid_after_a_stage_keeps_what_is_left_of_it():
    ctx = case(["two", "square"], kept=[[1, 2, 11, 20, 34], [1, 9, 35]]).ctx
    assert kept_lists(Uniform(stride=2).select(ctx)) == [[1, 3, 4], [0]]


def test_defaults():
    assert (Uniform().keep, Uniform().stride) == (0.25, None)
    assert (Uniform(stride=3).keep, Uniform(stride=3).stride) == (None, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": 0.5, "stride": 3}, r"^keep: expected either keep or stride, got keep=0\.5 and stride=3$"),
        ({"stride": 0}, r"^stride: expected a whole number >= 1, got 0$"),
        ({"stride": 1.5}, r"^stride: expected a whole number >= 1, got 1\.5$"),
        ({"keep": 0}, r"^keep: expected a share .* got 0$"),
        ({"layer": -1}, r"^layer: expected a whole number >= 0, got -1$"),
        ({"order": "column"}, r"^order: expected 'lattice' or 'raster', got 'column'$"),
        ({"stride": 2, "order": "raster"}, r"^order: expected nothing beside a stride, got 'raster'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        Uniform(**settings)
