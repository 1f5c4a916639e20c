"""How much a token is like those around it on its crop's grid (VisionTrim's local token affinity), beside another score."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from vlmprune.constants import remembered

NEARNESS = 0.5
"""How much distance on the grid counts beside that of features (the paper's w3; its w1 and w2 are 1)."""


def local_affinity(features: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Mean over the ``window x window`` places around each token, as far as they are there, of ``-d^2 - 0.5 p^2``.

    d is the distance of the two features over the standard deviation of all numbers of the crop's features, p that of their
    places over the standard deviation of all its rows' and columns' numbers. Each pair is looked at once.

    Args:
        features: ``[i, T, D]`` of crops of one grid.
        grid: its rows and columns, T in all.
        window: an odd number.

    Returns:
        ``[i, T]`` float64; 0 is most alike.
    """
    rows, columns = grid
    x = features.float().reshape(len(features), rows, columns, features.shape[2])
    spread = features.float().flatten(1).var(1) if features[0].numel() > 1 else x.new_ones(len(x))
    spread = torch.where(spread == 0, 1.0, spread.double())  # then all are alike
    total = torch.zeros(x.shape[:3], dtype=torch.float64, device=x.device)
    reach = range(-(window // 2), window // 2 + 1)
    for down, right in product(reach, reach):
        if (down, right) <= (0, 0) or down >= rows or abs(right) >= columns:
            continue
        here = slice(0, rows - down), slice(max(0, -right), columns - max(0, right))
        there = slice(down, rows), slice(max(0, right), columns + min(0, right))
        apart = (x[:, *here] - x[:, *there]).square().sum(-1).double() / spread[:, None, None]
        total[:, *here] -= apart
        total[:, *there] -= apart
    places, near = _places(rows, columns, window, x.device).unbind()
    return total.flatten(1) / places - NEARNESS * near


def steadier(one: Tensor, other: Tensor) -> Tensor:
    """The mean of two scores ``[i, T]`` float64 of each crop's tokens, where one counts the more the less it varies."""
    varies, against = (x.var(1, keepdim=True) if x.shape[1] > 1 else x * 0 for x in (one, other))
    share = torch.where(varies + against > 0, against / (varies + against), 0.5)
    return share * one + (1 - share) * other


@remembered()
def _places(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """``[2, T]`` float64: how many places of the grid are around each, itself among them, and their mean ``p^2``."""
    numbers = [float(part) for place in product(range(rows), range(columns)) for part in place]
    mean = sum(numbers) / len(numbers)
    spread = sum((part - mean) ** 2 for part in numbers) / (len(numbers) - 1) or 1.0
    found: list[tuple[int, float]] = []
    for r, c in product(range(rows), range(columns)):
        around = [(a - r) ** 2 + (b - c) ** 2 for a, b in _around(r, c, rows, columns, window // 2)]
        found.append((len(around), sum(around) / len(around) / spread))
    return torch.tensor(found, dtype=torch.float64).T.contiguous().to(device)


def _around(r: int, c: int, rows: int, columns: int, reach: int) -> product[tuple[int, int]]:
    down = range(max(0, r - reach), min(rows, r + reach + 1))
    across = range(max(0, c - reach), min(columns, c + reach + 1))
    return product(down, across)
