"""The uniform baseline: visual tokens evenly spaced over the image, in raster order, or on a coarse grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import PruningPolicy, TokenContext
from vlmprune.policies.checks import check_keep, check_layer, check_whole, check_word
from vlmprune.policies.choose import index_of, quotas, select_counts
from vlmprune.policies.lattice import grid_count, lattice_scores, stride_grid

KEEP = 0.25


@dataclass(frozen=True)
class Uniform(PruningPolicy):
    """Keeps evenly spaced tokens of every image, whatever it shows.

    By default they are spread in two dimensions, over rows and columns alike: a lattice of exactly as many tokens. After
    an earlier stage the lattice is that of the whole image, as dense as the share that stays; what is left of it is kept,
    and what is missing comes from all over the image. In raster order, FEATHER's criterion, it is every ``N / k``-th of
    the N entering tokens, at ``floor((i + 0.5) * N / k)``: where k is a multiple of the rows, or nearly, they stand in
    columns with nothing between (k = 96 of 24 x 24: four columns).

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones.
        keep: share (float) of the visual tokens, or visual tokens per image (int); 0.25 if neither this nor
            ``stride`` is given.
        stride: instead of ``keep``: the tokens ``[::stride, ::stride]`` of every image's patch grid.
        order: how ``keep`` spaces them: ``"lattice"``, or ``"raster"`` (the paper's).

    Raises:
        InputError: a setting is out of range, or both ``keep`` and ``stride`` are given.
    """

    summary = "evenly spaced tokens, or a coarse grid"
    paper = "baseline; the uniform criterion of FEATHER, arXiv 2412.13180"
    presets = {192: "layer=0,keep=192", 128: "layer=0,keep=128", 64: "layer=0,keep=64"}

    layer: int = 2
    keep: int | float | None = None
    stride: int | None = None
    order: Literal["lattice", "raster"] = "lattice"

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_word("order", self.order, "lattice", "raster")
        both = self.keep is not None and self.stride is not None
        check(not both, "keep", "either keep or stride", f"keep={self.keep!r} and stride={self.stride!r}")
        if self.stride is not None:
            check_whole("stride", self.stride, 1)
            check(self.order == "lattice", "order", "nothing beside a stride", repr(self.order))
        else:
            object.__setattr__(self, "keep", KEEP if self.keep is None else self.keep)
            check_keep(self.keep)

    def select(self, ctx: TokenContext) -> Tensor:
        """The evenly spaced tokens; with ``stride``, one host read for the width."""
        if self.keep is None:
            return self._grid(ctx)
        counts = quotas(ctx, self)
        if self.order == "raster":
            return self._spaced(ctx, counts)
        return select_counts(lattice_scores(ctx, counts), ctx, counts)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Exact, but for ``stride``: then the grid of whole, square images."""
        if self.stride is None:
            return super().kept(tokens, images, layer)
        return grid_count(tokens, images, self.stride)

    def _spaced(self, ctx: TokenContext, counts: list[int]) -> Tensor:
        kept, tokens = torch.tensor(counts)[:, None], torch.tensor(ctx.counts)[:, None]
        i = torch.arange(max(counts))
        index = (2 * i + 1) * tokens // (2 * kept).clamp(min=1)  # floor((i + 0.5) * N / k) in whole numbers
        return torch.where(i < kept, index, -1).to(ctx.mask.device, non_blocking=True)

    def _grid(self, ctx: TokenContext) -> Tensor:
        assert self.stride is not None
        kept = stride_grid(ctx, self.stride)
        # An earlier stage may have dropped the whole grid; a sample with tokens still keeps its first one.
        first = torch.zeros_like(kept)
        first[:, :1] = ctx.mask[:, :1] & ~kept.any(1, keepdim=True)
        return index_of(kept | first)
