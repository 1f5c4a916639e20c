"""Of which patches each visual token is made: the crops of an image, and for each token its patches and their shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.constants import remembered
from vlmprune.models.host.views import ImageViews, View
from vlmprune.policies.base import Crop, Grid


class Part(NamedTuple):
    """What one crop has in a grid: the first row and column, and how many."""

    top: int
    left: int
    rows: int
    columns: int


def parts_of(view: View, patches: Grid) -> Iterator[tuple[Grid, Part]]:
    """The crops that have tokens in a grid, row by row: place among the crops it shows, and the tokens.

    A token belongs to the crop in which the middle of it lies.
    """
    rows, columns = view.grid[0], view.grid[1] - view.newline
    top, left, height, width = view.box or (0, 0, *patches)
    down = _spans(rows, height, top, patches[0])
    across = _spans(columns, width, left, patches[1])
    for a, first, n in down if view.crops[0] else ():
        for b, start, m in across:
            yield (a, b), Part(first, start, n, m)


def _spans(tokens: int, patches: int, first: int, size: int) -> list[tuple[int, int, int]]:
    """Along one side: which crop, its first token, how many it has."""
    crops = [((2 * i + 1) * patches + 2 * tokens * first) // (2 * tokens * size) for i in range(tokens)]
    found = []
    for crop, members in groupby(range(tokens), key=crops.__getitem__):
        own = list(members)
        found.append((crop, own[0], len(own)))
    return found


def crops_of(images: Sequence[ImageViews], patches: Grid | None) -> tuple[tuple[Crop, ...], ...]:
    """The crops of one sample's images, for a policy; ``patches`` of a crop, None = every grid is one."""
    found, first = [], 0
    for image in images:
        own: list[Crop] = []
        for view in image:
            rows, columns = view.grid
            if patches is None or (view.box is None and view.crops == (1, 1)):
                own.append(Crop(first, columns, rows, columns))
            else:
                for _, part in parts_of(view, patches):
                    own.append(Crop(first + part.top * columns + part.left, columns, part.rows, part.columns))
            first += rows * columns
        found.append(tuple(own))
    return tuple(found)


def plain(images: Sequence[ImageViews], side: int) -> bool:
    """Whether every token is one patch, and every crop a grid."""
    return side == 1 and all(view == View(view.grid) for image in images for view in image)


@remembered(64)
def mosaic_cells(images: tuple[ImageViews, ...], patches: Grid, side: int, device: torch.device) -> Tensor:
    """``[I, T, m]`` int64: the patches of every token of every crop, -1 = no such token."""
    return _mosaic(images, patches, side)[0].long().to(device)


@remembered(64)
def mosaic_shares(images: tuple[ImageViews, ...], patches: Grid, side: int, device: torch.device) -> Tensor:
    """``[I, T, m]`` float32: how much of the token each of them is."""
    return _mosaic(images, patches, side)[1].float().to(device)


@lru_cache(64)
def _mosaic(images: tuple[ImageViews, ...], patches: Grid, side: int) -> Tensor:
    """Both, ``[2, I, T, m]`` float64."""
    found, crop = [], 0
    for view in (view for image in images for view in image):
        rows, columns = view.grid[0], view.grid[1] - view.newline
        top, left, height, width = view.box or (0, 0, *patches)
        empty = not rows * columns
        down, across = (
            () if empty else _taps(*line, side) for line in ((rows, height, top), (columns, width, left))
        )
        for _, part in () if empty else parts_of(view, patches):
            ys, wy = (t[part.top : part.top + part.rows] for t in down)
            xs, wx = (t[part.left : part.left + part.columns] for t in across)
            y, x = ys[:, None, :, None], xs[None, :, None, :]
            number = crop + y // patches[0] * view.crops[1] + x // patches[1]
            at = (number * patches[0] + y % patches[0]) * patches[1] + x % patches[1]
            share = wy[:, None, :, None] * wx[None, :, None, :]
            found.append(torch.stack([at.double(), share.expand_as(at)]).flatten(3, 4).flatten(1, 2))
        crop += view.crops[0] * view.crops[1]
    taps = max((x.shape[2] for x in found), default=1)
    wide = [torch.nn.functional.pad(x, (0, taps - x.shape[2])).transpose(0, 1) for x in found]
    out = pad_sequence(wide, batch_first=True, padding_value=-1.0).transpose(1, 2).transpose(0, 1)
    out[1].clamp_(min=0)
    return out


def _taps(tokens: int, patches: int, first: int, side: int) -> tuple[Tensor, Tensor]:
    """Along one side, for every token: its patches ``[tokens, k]`` int64, and their shares, float64."""
    order = torch.arange(tokens)[:, None]
    if tokens * side == patches:  # blocks, or each its own
        return first + order * side + torch.arange(side), torch.full((tokens, side), 1 / side).double()
    # bilinear, as torch.nn.functional.interpolate without aligned corners
    place = ((order.double() + 0.5) * (patches / tokens) - 0.5).clamp(min=0)
    low = place.long().clamp(max=patches - 1)
    high = (low + 1).clamp(max=patches - 1)
    return first + torch.cat([low, high], 1), torch.cat([1 - (place - low), place - low], 1)


class Packed(NamedTuple):
    """Packed patches as a layer's attention sees them.

    Attributes:
        groups: how many patches each frame or window has, in the tower's order.
        units: for each token of each frame, the block of patches (in the tower's order) that it is.
    """

    groups: tuple[int, ...]
    units: tuple[tuple[int, ...], ...]


@lru_cache(64)
def packed_frames(frames: tuple[Grid, ...], side: int, window: int | None, permuted: int | None) -> Packed:
    """How the tokens of ``frames`` (rows and columns each) lie in the tower's packed patches.

    Args:
        frames: in tokens.
        side: of the block of patches that is a token.
        window: rows and columns of a window in tokens, where the layer attends in windows; None = in frames.
        permuted: the same of the tower, where it orders its patches by windows, whatever the layer; None = it does not.
    """
    units, groups, first = [], [], 0
    for rows, columns in frames:
        count = rows * columns
        lines = _windows(rows, columns, permuted) if permuted else [list(range(count))]
        order = [token for line in lines for token in line]
        place = [0] * count
        for at, token in enumerate(order):
            place[token] = first + at
        units.append(tuple(place))
        groups += [len(line) * side**2 for line in lines] if window else [count * side**2]
        first += count
    return Packed(tuple(groups), tuple(units))


def _windows(rows: int, columns: int, side: int) -> list[list[int]]:
    """The tokens of each window of a frame, row by row; those at the edge may be smaller."""
    return [
        [
            r * columns + c
            for r in range(top, min(top + side, rows))
            for c in range(left, min(left + side, columns))
        ]
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]


@remembered(64)
def group_rows(groups: tuple[int, ...], device: torch.device) -> Tensor:
    """``[G, P]`` int64 which packed patch each patch of a group is, -1 behind those of a smaller one."""
    ends = accumulate(groups, initial=0)
    rows = [torch.arange(first, first + n) for first, n in zip(ends, groups, strict=False)]
    return pad_sequence(rows, batch_first=True, padding_value=-1).to(device)


@remembered(64)
def packed_cells(packed: Packed, side: int, device: torch.device) -> Tensor:
    """``[I, T, m]`` int64 the patches ``g P + p`` of every token of every frame, -1 = no such token."""
    most = max(packed.groups)
    place: list[int] = []
    for group, n in enumerate(packed.groups):
        place += range(group * most, group * most + n)
    where = torch.tensor(place).view(-1, side**2)
    rows = [where[torch.tensor(units)] for units in packed.units]
    return pad_sequence(rows, batch_first=True, padding_value=-1).to(device)


@remembered(64)
def packed_units(packed: Packed, device: torch.device) -> Tensor:
    """``[I, T, 1]`` int64 the block of patches that every token of every frame is, -1 = no such token."""
    rows = [torch.tensor(units) for units in packed.units]
    return pad_sequence(rows, batch_first=True, padding_value=-1)[..., None].to(device)
