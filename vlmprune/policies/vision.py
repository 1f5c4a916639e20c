"""What a policy reads of the vision tower: query and key of a layer, and of which patches each visual token is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import counting
from vlmprune.ops.scoring import Scoring
from vlmprune.policies.inputs import Rating


class Crop(NamedTuple):
    """The visual tokens of one crop: a rectangle in one of its image's grids.

    Attributes:
        first: place of its first token among its sample's visual tokens.
        width: how many tokens after the first of a row the next row begins.
        rows, columns: its tokens.
    """

    first: int
    width: int
    rows: int
    columns: int


@dataclass(frozen=True)
class VisionAttention:
    """Query and key of one vision-tower layer, for the crops of a call, and of which patches each visual token is made.

    A crop is what the tower sees as one image: a whole image, a tile of it, its small view, or a video's frame.

    Attributes:
        query, key: ``[G, H, P, D]``, or ``[G, H, 1 + P, D]`` with the CLS row first; by crop, or by window where the layer
            attends in windows.
        scale: softmax scale.
        cls: whether row 0 is a CLS token.
        mask: ``[G, P]`` bool, False at patches that are padding (no CLS then); None = none are.
        cells: ``[I, T, m]`` int64, the patches (``g P + p``) of each of the at most T tokens of the I crops, -1 = no such
            token; None = the tokens are the patches in their order.
        shares: ``[I, T, m]`` float32, how much of a token each of its patches is; None = equal parts.
        rows: ``[I, 1]`` float32, the patches of each crop, where the layer attends in windows; else None.
        value: like ``key``, or None if it was not asked for (``Needs(values=True)``).
    """

    query: Tensor
    key: Tensor
    scale: float
    cls: bool
    mask: Tensor | None = None
    cells: Tensor | None = None
    shares: Tensor | None = None
    rows: Tensor | None = None
    value: Tensor | None = None

    def rating(self) -> Rating:
        """The attention that patches receive, one column each: from CLS, or without one the mean over all rows.

        In windows it is the sum over the window's rows.
        """
        groups, _, places, _ = self.key.shape
        rows = columns = every = counting(groups, places, self.key.device)
        if self.cls:
            rows = counting(groups, 1, self.key.device)
            columns = counting(groups, places - 1, self.key.device, 1)
        if self.mask is not None:
            patches = self.mask.shape[1]
            rows = torch.where(self.mask, every, patches).sort(dim=1).values
            rows = rows.masked_fill(rows == patches, -1)
        scoring = Scoring(
            self.query,
            self.key,
            rows,
            columns,
            self.scale,
            key_mask=self.mask,
            causal=False,
            row_reduce="mean" if self.rows is None else "sum",
        )
        return Rating(scoring, apart=True)

    def received(self) -> Tensor:
        """Attention that the patches of every token receive, from CLS or from a mean row of the crop: ``[I, T]`` float32.

        A row of another window pays nothing.
        """
        scores = self.per_token(self.rating().scores())
        return scores if self.rows is None else scores / self.rows

    def over_rows(self, paid: Tensor, rows: Tensor | int) -> Tensor:
        """The same, of what the ``rows`` of each group have ``paid [G, P]`` together."""
        return self.per_token(paid / rows) if self.rows is None else self.per_token(paid) / self.rows

    def per_token(self, patches: Tensor) -> Tensor:
        """Mean over the patches that each token is made of: ``[G, P, ...]`` to ``[I, T, ...]`` float32; 0 = no such token."""
        return (patches if self.cells is None else mixed(patches, self.cells, self.shares)).float()


def mixed(parts: Tensor, cells: Tensor, shares: Tensor | None) -> Tensor:
    """Means ``[I, T, ...]`` of ``parts [G, P, ...]``, run together, at ``cells [I, T, m]``, -1 = zeros, by ``shares``.

    In float32; of one part each in its own precision.
    """
    if cells.shape[2] == 1:  # nothing to mix
        rows = ops.gather_tokens([parts.flatten(0, 1)[None]], cells.view(1, -1))[0]
        return rows.view(*cells.shape[:2], *parts.shape[2:])
    flat, real = parts.flatten(0, 1), cells >= 0
    weight = real / cells.shape[2] if shares is None else shares
    weight = weight.view(*cells.shape, *[1] * (flat.ndim - 1))
    blank = ~real.view(weight.shape)
    rows = flat[cells.clamp(min=0)].float().masked_fill(blank, 0.0)  # 0 times NaN is NaN
    return (rows * weight).sum(2)
