"""Contexts whose images are a small view and tiles with newline tokens, as LLaVA-NeXT's, and where their tokens are."""

from dataclasses import dataclass

import torch

from vlmprune.policies.base import Crop, TokenContext, VisionAttention
from vlmprune.testing.context import draw, padded

WIDTH = 8


@dataclass(frozen=True)
class Cut:
    """An image of the batch, told without the library: places are among its sample's visual tokens.

    Attributes:
        sample: which one it is of.
        crops: numbers of its crops in the call; the first is the small view.
        places: for each crop, the places of its tokens; of tiles in raster order of what is left of them.
        patches: for each crop, the patch that each of these tokens is.
        at: for each tile, row and column of each of its tokens among those of all tiles.
        grid: rows and columns of all tiles' tokens.
        tokens: how many tokens the image has, newlines among them.
    """

    sample: int
    crops: list
    places: list
    patches: list
    at: list
    grid: tuple
    tokens: int


@dataclass(frozen=True)
class Image:
    """One of ``down`` times ``across`` tiles, none for a crop alone; ``box`` (top, left, rows, columns) is left of their patches."""

    side: int
    down: int
    across: int
    box: tuple


def image(side, down=0, across=0, box=None):
    """An image of crops of ``side`` times ``side`` patches."""
    return Image(side, down, across, box or (0, 0, down * side, across * side))


def tiled(samples, layers=(-2,), cls=True, few_values=False, seed=0, H=3, D=8):
    """A context of samples of images, and its images as ``Cut``. All crops are of one size."""
    g = torch.Generator().manual_seed(seed)
    flat = [one for sample in samples for one in sample]
    side, crops, cuts = flat[0].side, sum(1 + one.down * one.across for one in flat), cuts_of(samples)
    own = [(crop, patches) for cut in cuts for crop, patches in zip(cut.crops, cut.patches, strict=True)]
    lines = [[crop * side**2 + p for p in patches] for crop, patches in own]
    alone = all(not one.down for one in flat)
    cells, vision = None if alone else padded(lines)[..., None], {}
    for layer in layers:
        query, key = draw((crops, 2 * H, side**2 + cls, D), side**2 + cls, few_values, g)
        vision[layer] = VisionAttention(query[:, :H], key, D**-0.5, cls, cells=cells)
    grids = [[one_grid for one in sample for one_grid in grids_of(one)] for sample in samples]
    counts = tuple(sum(cut.tokens for cut in cuts if cut.sample == b) for b in range(len(samples)))
    order = padded([list(range(n)) for n in counts])
    ctx = TokenContext(
        layer=0,
        mask=order >= 0,
        counts=counts,
        ordinals=order,
        positions=torch.where(order < 0, -1, order + 3),
        grids=tuple(map(tuple, grids)),
        hidden=torch.randn(len(samples), order.shape[1], WIDTH, generator=g),
        vision=vision,
        sizes=tuple(tuple(cut.tokens for cut in cuts if cut.sample == b) for b in range(len(samples))),
        crops=tuple(
            tuple(crops_of(cut, side) for cut in cuts if cut.sample == b) for b in range(len(samples))
        ),
    )
    return ctx, cuts


def grids_of(one):
    small = (one.side, one.side)
    return [small, (one.box[2], one.box[3] + 1)] if one.down else [small]


def crops_of(cut, side):
    """As a context tells them."""
    crops = [Crop(cut.places[0][0], side, side, side)]
    for places, at in zip(cut.places[1:], cut.at, strict=True):
        rows, columns = (len({rc[i] for rc in at}) for i in (0, 1))
        crops.append(Crop(places[0], cut.grid[1] + 1, rows, columns))
    return tuple(crops)


def cuts_of(samples):
    """Written out token by token; a tile without a token is left out, as in a context."""
    found, crop = [], 0
    for b, sample in enumerate(samples):
        first = 0
        for one in sample:
            square = list(range(one.side**2))
            top, left, rows, columns = one.box
            tiles, behind = {}, first + one.side**2
            for r in range(rows):
                for c in range(columns):
                    (down, y), (across, x) = divmod(top + r, one.side), divmod(left + c, one.side)
                    tile = tiles.setdefault(down * one.across + across, ([], [], []))
                    for kept, value in zip(
                        tile, (behind + r * (columns + 1) + c, y * one.side + x, (r, c)), strict=True
                    ):
                        kept.append(value)
            order = sorted(tiles)
            cut = Cut(
                sample=b,
                crops=[crop, *(crop + 1 + tile for tile in order)],
                places=[[first + p for p in square], *(tiles[tile][0] for tile in order)],
                patches=[square, *(tiles[tile][1] for tile in order)],
                at=[tiles[tile][2] for tile in order],
                grid=(rows, columns),
                tokens=one.side**2 + (rows * (columns + 1) if one.down else 0),
            )
            found.append(cut)
            crop += 1 + one.down * one.across
            first += cut.tokens
    return found


def share_slowly(budget, sizes):
    """Evenly, one token after the other, to whoever has fewest and room; of these to the first."""
    kept = [0] * len(sizes)
    for _ in range(min(budget, sum(sizes))):
        at = min((k, i) for i, k in enumerate(kept) if k < sizes[i])[1]
        kept[at] += 1
    return kept


def left_over(budget, kept, sizes, weights):
    """What is granted, and one token in turn to whoever has room, the heaviest first, while some are left."""
    kept = [min(k, n) for k, n in zip(kept, sizes, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: (-weights[i], i))
    while sum(kept) < min(budget, sum(sizes)):
        for i in order:
            if kept[i] < sizes[i] and sum(kept) < budget:
                kept[i] += 1
    return kept


def newlines_of(ctx, cut, first):
    """Places of an image's tokens that are of no crop, ascending; ``first`` is its own first place."""
    real = {place for places in cut.places for place in places}
    return [place for place in range(first, first + cut.tokens) if place not in real]


def images_with_first(cuts):
    """Every image with the place of its first token in its sample."""
    before = {}
    for cut in cuts:
        yield cut, before.get(cut.sample, 0)
        before[cut.sample] = before.get(cut.sample, 0) + cut.tokens
