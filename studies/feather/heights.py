"""How far down the image tokens lie: thirds by the patches' centres, and the mean height, 0 = top edge, 1 = bottom edge."""

from __future__ import annotations

import numpy as np

from vlmprune.policies.base import Grid


def heights(grid: Grid) -> np.ndarray:
    """The height of every patch's centre, in raster order: ``[rows * columns]``."""
    rows, columns = grid
    return np.repeat((np.arange(rows) + 0.5) / rows, columns)


def thirds(grid: Grid) -> dict[str, np.ndarray]:
    """Which patches lie in each third. Rows do not always divide by 3: the outer thirds are equal, the middle has the rest."""
    at = heights(grid)
    return {
        "top third": at < 1 / 3,
        "middle third": (at >= 1 / 3) & (at <= 2 / 3),
        "bottom third": at > 2 / 3,
    }


def kept_heights(kept: np.ndarray, grid: Grid) -> dict[str, np.ndarray]:
    """Share of each sample's kept tokens in every third, and their mean height, from marks ``[samples, patches]``."""
    count = kept.sum(1)
    shares = {name: (kept & where).sum(1) / count for name, where in thirds(grid).items()}
    return shares | {"mean height": (kept * heights(grid)).sum(1) / count}


def row_profile(kept: np.ndarray, grid: Grid) -> np.ndarray:
    """Share of all kept tokens that lie in each row of the image: ``[rows]``, summing to 1."""
    per_row = kept.reshape(len(kept), *grid).sum((0, 2))
    return per_row / per_row.sum()
