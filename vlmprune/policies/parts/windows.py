"""A crop's grid: windows of it, and the best tokens of each (VScan); the tokens around others (HiPrune)."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Grid
from vlmprune.policies.choose import rank_within
from vlmprune.policies.groups import Groups


def windows_of(grid: Grid, window: int) -> list[int]:
    """Number of the window that each token of a grid lies in, in raster order; windows at its edge may be smaller.

    Example:
        >>> windows_of((2, 5), 2)
        [0, 0, 1, 1, 2, 0, 0, 1, 1, 2]
    """
    across = -(-grid[1] // window)
    return [r // window * across + c // window for r in range(grid[0]) for c in range(grid[1])]


def best_of_windows(scores: Tensor, grid: Grid, window: int, share: int) -> tuple[Tensor, int]:
    """The best tokens of every window: ``share`` divided by the windows and rounded down, or all that a window has.

    Args:
        scores: ``[i, P]`` of crops of one grid.
        grid: its rows and columns, P in all.
        window: rows and columns of a window.
        share: how many of a crop all windows together may have.

    Returns:
        Marks ``[i, P]`` bool, and how many tokens of each crop they mark.
    """
    windows = windows_of(grid, window)
    sizes = Counter(windows)
    each = share // len(sizes)
    layout = whole_numbers(tuple(windows), scores.device).expand_as(scores)
    return rank_within(scores, layout) < each, sum(min(each, most) for most in sizes.values())


def with_neighbours(crops: Groups, marked: Tensor) -> Tensor:
    """``[I, T]`` bool, the tokens of every crop that are ``marked [I, T]``, and those left, right, above and below them."""
    last, device = marked.shape[1] - 1, marked.device
    columns = whole_numbers(tuple(crop.columns for crop in crops.crops), device)[:, None]
    place = torch.arange(last + 1, device=device).expand_as(marked)
    column = place % columns
    found = marked
    for beside, inside in (
        (place - 1, column > 0),
        (place + 1, column < columns - 1),
        (place - columns, place >= columns),
        (place + columns, place + columns <= last),
    ):
        found = found | (marked.gather(1, beside.clamp(0, last)) & inside)
    return found
