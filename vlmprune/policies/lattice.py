"""Spreads k tokens evenly over images in two dimensions: exactly k of every whole image, and sensibly of what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.policies.base import Grid, TokenContext, tokens_in

ACROSS, DOWN = 0.5698402909980532, 0.7548776662466927
"""1 / p^2 and 1 / p with p^3 = p + 1: multiples of these are spread evenly in two dimensions (Roberts' R2 sequence)."""


@lru_cache(maxsize=512)
def lattice(grid: Grid, kept: int) -> tuple[int, ...]:
    """``kept`` (0 to all) of the tokens of a grid, as numbers in raster order, ascending.

    Rows as far apart as columns are; the rows' counts differ by one at most, and each stands in the middle of its share.
    """
    rows, columns = grid
    lines = min(rows, max(math.ceil(kept / columns), round(math.sqrt(kept * rows / columns))))
    out: list[int] = []
    for i in range(lines):
        row, here = (2 * i + 1) * rows // (2 * lines), (i + 1) * kept // lines - i * kept // lines
        out += [row * columns + (2 * j + 1) * columns // (2 * here) for j in range(here)]
    return tuple(out)


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
    tables = []
    for grids, tokens, count in zip(ctx.grids, ctx.counts, kept, strict=True):
        ends = accumulate((tokens_in([grid]) for grid in grids), initial=0)
        parts = pairwise(end * count // max(tokens, 1) for end in ends)
        scores = (grid_scores(grid, b - a) for grid, (a, b) in zip(grids, parts, strict=True))
        tables.append(torch.cat([torch.zeros(1), *scores]))  # in front, what padding points to
    table = pad_sequence(tables, batch_first=True).to(ctx.ordinals.device, non_blocking=True)
    return table.gather(1, ctx.ordinals + 1)
