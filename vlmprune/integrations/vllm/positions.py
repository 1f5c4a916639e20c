"""Positions of three dimensions (frame, row, column) in a prompt whose images were pruned. Nothing of vLLM is needed here.

Text stands where it would behind whole images, and kept tokens where they were: ``positions="keep"`` of transformers.
Which tokens stay is known only once the tower has run. Until then an image's tokens all stand at its first one; as an
image has one frame, that first position stays readable in their frame, however often they are put in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 4
"""How many columns of an image's rows say where in the image they are."""

BYTE = 256
"""Columns have the rows' type: bfloat16 tells whole numbers apart up to 256, and a panorama has more cells a side."""


class Placed(NamedTuple):
    """An image in a prompt.

    Attributes:
        start: index of its first token.
        tokens: how many of its tokens stay.
        side: the larger of its rows and columns: so many positions it takes, whole or pruned.
    """

    start: int
    tokens: int
    side: int


def cells_of(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """The columns ``[rows * columns, 4]`` (int64, 0 to 255) of an image's tokens: high and low byte of row and column.

    They are made on the device (None = the CPU): a copy to it would wait for it.

    Example:
        >>> cells_of(1, 2).tolist()
        [[0, 0, 0, 0], [0, 0, 0, 1]]
    """
    down, across = (torch.arange(n, device=device) for n in (rows, columns))
    row, column = torch.meshgrid(down, across, indexing="ij")
    both = torch.stack([row.flatten(), column.flatten()], 1)
    return torch.stack([both // BYTE, both % BYTE], 2).flatten(1)


def within_image(columns: Tensor) -> Tensor:
    """Frame, row and column ``[3, n]`` (int64) from an image's columns ``[n, 4]`` of any type that holds 0 to 255."""
    high, low = columns.long().view(-1, 2, 2).unbind(2)
    row, column = (high * BYTE + low).T
    return torch.stack([torch.zeros_like(row), row, column])


def laid_out(length: int, images: Sequence[Placed]) -> tuple[Tensor, int]:
    """Positions ``[3, length]`` (int64) of a prompt, final for text, and the next one's; ``images`` in prompt order.

    Example:
        >>> positions, after = laid_out(6, [Placed(1, 2, side=5)])
        >>> positions[0].tolist(), after
        ([0, 1, 1, 6, 7, 8], 9)
    """
    parts: list[Tensor] = []
    done = position = 0
    for image in images:
        begin = position + image.start - done
        parts += [torch.arange(position, begin), torch.full((image.tokens,), begin)]
        position, done = begin + image.side, image.start + image.tokens
    end = position + length - done
    return torch.cat([*parts, torch.arange(position, end)]).expand(3, -1).contiguous(), end


def put_back(positions: Tensor, image: Tensor, done: int, within: Tensor) -> Tensor:
    """The positions ``[3, N]`` with image tokens where they were in their images.

    Args:
        positions: ``[3, N]`` as ``laid_out`` made them; tokens may be in place already.
        image: ``[N]`` bool, the image tokens.
        done: tokens before this one are left alone.
        within: ``[3, n]`` of the first n image tokens that are not; of chunks of a prompt these are fewer than all.
    """
    fresh = image & (torch.arange(len(image), device=image.device) >= done)
    number = fresh.cumsum(0) - 1
    mine = fresh & (number < within.shape[1])
    moved = positions[0] + within[:, number.clamp(0, within.shape[1] - 1)]
    return torch.where(mine, moved, positions)
