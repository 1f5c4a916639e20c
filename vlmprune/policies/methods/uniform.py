"""The uniform baseline: visual tokens evenly spaced over the image, in raster order, or on a coarse grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.constants import remembered
from vlmprune.errors import check
from vlmprune.policies.base import PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.checks import check_keep, check_layer, check_whole, check_word
from vlmprune.policies.choose import quotas
from vlmprune.policies.parts.lattice import grid_count, lattice_scores, stride_code

KEEP = 0.25


@dataclass(frozen=True)
class Uniform(PruningPolicy):
    """Keeps evenly spaced tokens of every image, whatever it shows.

    By default they are spread in two dimensions, over rows and columns alike: a lattice of exactly as many tokens. After
    an earlier stage the lattice is that of the whole image, as dense as the share that stays; what is left of it is kept,
    and what is missing comes from all over the image. In raster order, FEATHER's criterion, it is every ``N / k``-th of
    the N entering tokens, at ``floor((i + 0.5) * N / k)``: where k is a multiple of the rows, or nearly, they stand in
    columns with nothing between (k = 96 of 24 x 24: four columns).

    A lattice is remembered by grid and count. Finding a new one takes the host some n^1.5.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones.
        keep: share (float) of the visual tokens, or visual tokens per image (int); 0.25 if neither this nor
            ``stride`` is given.
        stride: instead of ``keep``: the tokens ``[::stride, ::stride]`` of every grid.
        order: how ``keep`` spaces them: ``"lattice"``, or ``"raster"`` (the paper's).

    Raises:
        InputError: a setting is out of range, or both ``keep`` and ``stride`` are given.
    """

    summary = "evenly spaced tokens, or a coarse grid"
    paper = "baseline; the uniform criterion of FEATHER, arXiv 2412.13180"
    formula = (
        "p_j = (c - (C - 1) / 2 + d (r - (R - 1) / 2) + 1 / 2) k / n mod 1  (order='lattice')\n"
        "r = row, c = column of j in its grid of R = rows, C = columns, turned where R > C\n"
        "d = the shift, at most n / 2k, for which the shortest vector of the lattice is longest\n"
        "keep the k lowest p_j, or as many in rows as far apart as columns, whichever leaves smaller gaps"
    )
    presets = each("layer=0,keep={}")
    growth = "n"

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

    @property
    def fixed_count(self) -> bool:
        """With a stride it takes the image's rows and columns."""
        return self.stride is None

    def rank(self, ctx: TokenContext) -> Ranking:
        """The evenly spaced tokens; with ``stride`` after an earlier stage, one host read for the width."""
        if self.stride is not None:
            return self._grid(ctx)
        counts = tuple(quotas(ctx, self))
        if self.order == "raster":
            return Ranking(spaced(ctx.counts, counts, ctx.device), counts, static=True)
        return Ranking(lattice_scores(ctx, counts), counts, static=ctx.whole)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Exact, but for ``stride``: then the grid of whole, square images."""
        if self.stride is None:
            return super().kept(tokens, images, layer)
        return grid_count(tokens, images, self.stride)

    def _grid(self, ctx: TokenContext) -> Ranking:
        """The grid scores 1; an earlier stage may have dropped all of it, and a sample with tokens keeps its first one."""
        assert self.stride is not None
        code, sizes = stride_code(ctx, self.stride)
        if ctx.whole:
            return Ranking(code.float(), sizes)
        return Ranking(code.float(), tuple(min(1, n) for n in ctx.counts), code=code, extra=sizes)


@remembered()
def spaced(tokens: tuple[int, ...], kept: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 ``[B, N]``: 1 at ``floor((i + 0.5) * N / k)``, for samples of so many tokens, elsewhere 0."""
    scores = torch.zeros(len(tokens), max(tokens, default=0))
    for row, n, k in zip(scores, tokens, kept, strict=True):
        row[[(2 * i + 1) * n // (2 * k) for i in range(k)]] = 1  # in whole numbers
    return scores.to(device)
