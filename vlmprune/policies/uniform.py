"""The uniform baseline: evenly spaced visual tokens, in raster order or on a two-dimensional grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import PruningPolicy, TokenContext, check_keep, check_layer, quotas
from vlmprune.policies.grid import check_stride, stride_grid
from vlmprune.policies.sets import index_of

KEEP = 0.25


@dataclass(frozen=True)
class Uniform(PruningPolicy):
    """Keeps evenly spaced tokens: k of the N entering ones at ``floor((i + 0.5) * N / k)``, or every image's grid.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones.
        keep: share (float) of the visual tokens, or visual tokens per image (int); 0.25 if neither this nor
            ``stride`` is given.
        stride: instead of ``keep``: the tokens ``[::stride, ::stride]`` of every image's patch grid.

    Raises:
        ValueError: a setting is out of range, or both ``keep`` and ``stride`` are given.
    """

    summary: ClassVar[str] = "evenly spaced tokens, or a coarse grid"
    paper: ClassVar[str] = "baseline; the uniform criterion of FEATHER, arXiv 2412.13180"
    presets: ClassVar[Mapping[int, str]] = {
        192: "layer=0,keep=192",
        128: "layer=0,keep=128",
        64: "layer=0,keep=64",
    }

    layer: int = 2
    keep: int | float | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        check_layer(self.layer)
        both = self.keep is not None and self.stride is not None
        check(not both, "keep", "either keep or stride", f"keep={self.keep!r} and stride={self.stride!r}")
        if self.stride is not None:
            check_stride(self.stride)
        else:
            object.__setattr__(self, "keep", KEEP if self.keep is None else self.keep)
            check_keep(self.keep)

    @property
    def layers(self) -> tuple[int, ...]:
        """The one stage."""
        return (self.layer,)

    def select(self, ctx: TokenContext) -> Tensor:
        """The evenly spaced tokens; with ``stride``, one host read for the width."""
        return self._spaced(ctx, self.keep) if self.keep is not None else self._grid(ctx)

    def _spaced(self, ctx: TokenContext, keep: float) -> Tensor:
        counts = quotas(ctx, keep)
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
