"""Tokens spread evenly over images in two dimensions: exactly k of every whole image, or its raster ``[::stride, ::stride]``.

And along the raster alone, at equal steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.constants import remembered, whole_numbers
from vlmprune.policies.base import Grid, TokenContext, tokens_in

ACROSS, DOWN = 0.5698402909980532, 0.7548776662466927
"""1 / p^2 and 1 / p with p^3 = p + 1: multiples of these are spread evenly in two dimensions (Roberts' R2 sequence)."""

SHIFTS = 64
"""How many shifts between rows are tried."""

NO_IMAGE = 1 << 62
"""First ordinal of an image that is not there: above every real one."""


@lru_cache(maxsize=512)
def lattice(grid: Grid, kept: int) -> tuple[int, ...]:
    """``kept`` (0 to all) of the tokens of a grid, as numbers in raster order, ascending.

    A slanted lattice, whose rows are all in use and shifted against one another, or an upright one, whose rows lie as far
    apart as its columns: whichever leaves smaller gaps. Where more than about a quarter stays, that is the slanted one.
    """
    rows, columns = grid
    if rows > columns:  # shifts go along the longer side
        turned = lattice((columns, rows), kept)
        return tuple(sorted(i % rows * columns + i // rows for i in turned))
    if kept in (0, rows * columns):
        return tuple(range(kept))
    return min(_slanted(grid, kept), _upright(grid, kept), key=lambda cells: _gaps(grid, cells))


def _slanted(grid: Grid, kept: int) -> tuple[int, ...]:
    """Every ``1 / share``-th of each row, and each row shifted so that tokens are as far from one another as can be."""
    rows, columns = grid
    share = kept / (rows * columns)
    down = (torch.arange(rows, dtype=torch.float64)[:, None] - (rows - 1) / 2) * _shift(1 / share)
    across = torch.arange(columns, dtype=torch.float64) - (columns - 1) / 2
    phase = ((down + across + 0.5) * share % 1).flatten()  # where a cell lies between two tokens of its row
    # Rounded, as equal phases may differ in their last bits; ties go to the lower number.
    order = (phase * 1e9).round().sort(stable=True).indices
    return tuple(sorted(order[:kept].tolist()))


def _shift(period: float) -> float:
    """The shift between rows, at most half a period, for which the lattice's shortest vector is longest."""

    def shortest(shift: float) -> float:
        lines = range(1, math.ceil(1.5 * math.sqrt(period)) + 1)
        skew = (((line * shift + period / 2) % period - period / 2) ** 2 + line**2 for line in lines)
        return round(min(period**2, *skew), 9)

    return max((period * step / (2 * SHIFTS) for step in range(SHIFTS + 1)), key=shortest)


def _upright(grid: Grid, kept: int) -> tuple[int, ...]:
    """Rows with equal counts but for one, each in the middle of its share, and so are the tokens in it."""
    rows, columns = grid
    lines = min(rows, max(math.ceil(kept / columns), round(math.sqrt(kept * rows / columns))))
    out: list[int] = []
    for i in range(lines):
        row, here = (2 * i + 1) * rows // (2 * lines), (i + 1) * kept // lines - i * kept // lines
        out += [row * columns + (2 * j + 1) * columns // (2 * here) for j in range(here)]
    return tuple(out)


def _gaps(grid: Grid, cells: Sequence[int]) -> float:
    """Mean 8th power of the cells' distances to the nearest kept one: the largest ones decide, then how many they are."""
    far = torch.full((math.prod(grid),), math.inf)
    far[list(cells)] = 0.0
    down, across = ((torch.arange(n)[:, None] - torch.arange(n)) ** 2 for n in grid)
    near = (far.view(grid) + down[:, :, None]).amin(1)  # squared, within the column
    return float((near[:, None] + across).amin(2).double().pow(4).mean())


def grid_scores(grid: Grid, kept: int) -> Tensor:
    """float32 ``[rows * columns]`` on the CPU: at least 1 on the lattice, less elsewhere; the best of either are spread."""
    rows, columns = grid
    down = torch.arange(rows, dtype=torch.float64)[:, None] * DOWN
    across = torch.arange(columns, dtype=torch.float64) * ACROSS
    scores = ((down + across) % 1).flatten().float()
    scores[list(lattice(grid, kept))] += 1
    return scores


def lattice_scores(ctx: TokenContext, kept: Sequence[int]) -> Tensor:
    """float32 ``[B, N]``: the best ``kept[b]`` of the entering tokens are spread evenly over the images of sample b.

    Every image gets its part by its size. Where tokens have been dropped before, the lattice is that of the whole images
    with as large a share of their tokens as ``kept[b]`` is of those that are left. Never waits for the device.
    """
    table = _lattice_table(ctx.grids, ctx.counts, tuple(kept), ctx.device)
    return table[:, : max(ctx.counts)] if ctx.whole else table.gather(1, ctx.ordinals.clamp(min=0))


@remembered()
def _lattice_table(
    grids: tuple[tuple[Grid, ...], ...], counts: tuple[int, ...], kept: tuple[int, ...], device: torch.device
) -> Tensor:
    """The scores of every sample's whole images, at least one place wide."""
    tables = []
    for own, tokens, count in zip(grids, counts, kept, strict=True):
        ends = accumulate((tokens_in([grid]) for grid in own), initial=0)
        parts = pairwise(end * count // max(tokens, 1) for end in ends)
        scores = (grid_scores(grid, b - a) for grid, (a, b) in zip(own, parts, strict=True))
        tables.append(torch.cat([*scores, torch.zeros(0 if own else 1)]))
    return pad_sequence(tables, batch_first=True).to(device)


def stride_grid(ctx: TokenContext, stride: int) -> Tensor:
    """Mark the tokens whose patch row and patch column are both multiples of ``stride``: bool ``[B, N]``.

    Rows and columns come from the ordinals, so a stage that follows another one finds the same grid, as far as it
    is still there. Never waits for the device.
    """
    width = max(1, *(len(grids) for grids in ctx.grids))
    firsts, columns = [], []
    for grids in ctx.grids:
        ends = list(accumulate((r * c for r, c in grids), initial=0))
        firsts.append(ends[:-1] + [NO_IMAGE] * (width - len(grids)))
        columns.append([c for _, c in grids] + [1] * (width - len(grids)))
    begins, wide = (whole_numbers(tuple(map(tuple, x)), ctx.ordinals.device) for x in (firsts, columns))
    image = (torch.searchsorted(begins, ctx.ordinals.contiguous(), right=True) - 1).clamp(min=0)
    patch = ctx.ordinals - begins.gather(1, image)
    across = wide.gather(1, image)
    return ctx.mask & (patch // across % stride == 0) & (patch % across % stride == 0)


def stride_code(ctx: TokenContext, stride: int) -> tuple[Tensor, tuple[int, ...]]:
    """int8 ``[B, N]``: 3 (stays in any case) at the tokens of ``stride_grid``, else 0; and at most how many each sample has.

    Exactly so many where whole images enter, and then nothing is asked of the device, nor built anew.
    """
    rows = [[len(range(0, r, stride)) * len(range(0, c, stride)) for r, c in grids] for grids in ctx.grids]
    sizes = tuple(min(n, sum(own)) for n, own in zip(ctx.counts, rows, strict=True))
    if ctx.whole:
        return _whole_code(ctx.grids, stride, ctx.device), sizes
    return torch.where(stride_grid(ctx, stride), 3, 0).to(torch.int8), sizes


@remembered()
def _whole_code(grids: tuple[tuple[Grid, ...], ...], stride: int, device: torch.device) -> Tensor:
    codes = []
    for own in grids:
        marks = [torch.zeros(0, dtype=torch.int8)]
        for grid in own:
            mark = torch.zeros(grid, dtype=torch.int8)
            mark[::stride, ::stride] = 3
            marks.append(mark.flatten())
        codes.append(torch.cat(marks))
    return pad_sequence(codes, batch_first=True).to(device)


def grid_count(tokens: int, images: float, stride: int) -> int:
    """How many tokens ``stride_grid`` marks of ``tokens`` of so many whole images, taken to be square."""
    side = math.sqrt(tokens / images) if images else 0.0
    return min(tokens, round(images * math.ceil(side / stride) ** 2))


@remembered()
def stride_scores(
    images: tuple[tuple[int, ...], ...], counts: tuple[tuple[int, ...], ...], device: torch.device
) -> Tensor:
    """float32 ``[B, N]``: the best ``counts[b][i]`` of the tokens of each image are those at equal steps,
    k of n at ``i floor(n / k)``, i = 0 ... k - 1.

    1 at every step of every image of every sample, elsewhere 0: of equal scores the first ones stay.

    Args:
        images: per sample, the tokens of each of its images.
        counts: how many of them stay, at least one.
        device: where the scores go.
    """
    scores = torch.zeros(len(images), max(map(sum, images), default=0))
    for row, sizes, own in zip(scores, images, counts, strict=True):
        first = 0
        for n, count in zip(sizes, own, strict=True):
            row[first : first + n : n // count] = 1
            first += n
    return scores.to(device)
