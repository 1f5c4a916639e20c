"""Which of the tokens entering a stage lie on the coarse raster grid ``[::stride, ::stride]`` of their image."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor

from vlmprune.policies.base import TokenContext

NO_IMAGE = 1 << 62
"""First ordinal of an image that is not there: above every real one."""


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
    layout = torch.tensor([firsts, columns], dtype=torch.int64).to(ctx.ordinals.device, non_blocking=True)
    image = (torch.searchsorted(layout[0], ctx.ordinals.contiguous(), right=True) - 1).clamp(min=0)
    patch = ctx.ordinals - layout[0].gather(1, image)
    across = layout[1].gather(1, image)
    return ctx.mask & (patch // across % stride == 0) & (patch % across % stride == 0)


def grid_count(tokens: int, images: float, stride: int) -> int:
    """How many tokens ``stride_grid`` marks of ``tokens`` of so many whole images, taken to be square."""
    side = math.sqrt(tokens / images) if images else 0.0
    return min(tokens, round(images * math.ceil(side / stride) ** 2))
