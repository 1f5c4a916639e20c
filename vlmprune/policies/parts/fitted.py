"""Schedules fitted offline and released: how many tokens of an image go within each layer (FitPrune's, of LLaVA-1.5-7B)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

IMAGE = 576
"""Tokens of the image that the schedules are of."""

SCHEDULES: Mapping[int, tuple[int, ...]] = {
    10: (0, 0, 1, 2, 1, 0, 1, 4, 5, 5, 11, 4, 2, 2, 0, 0, 1, 1, 2, 4, 2, 10, 1, 1, 1, 2, 1, 1, 0, 1),
    20: (0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0, 6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1),
    30: (0, 0, 7, 6, 4, 5, 16, 40, 24, 21, 24, 4, 2, 3, 4, 0, 16, 0, 11, 26, 6, 32, 3, 1, 0, 1, 2, 2, 4),
    40: (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1, 26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2),
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2),
    55: (6, 17, 69, 31, 34, 19, 59, 30, 23, 6, 8, 7, 2, 5, 8, 2, 29, 4, 12, 25, 4, 19, 2, 1, 0, 0, 1, 0, 1),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1),
}
"""Per cut of the FLOPs in percent, how many tokens go within each of the layers, the first one first, as released."""


def stages_of(reduction: int) -> tuple[int, ...]:
    """The layers of a schedule's stages: those behind a layer in which tokens go.

    Example:
        >>> stages_of(90)[:8]
        (1, 2, 3, 4, 5, 6, 7, 16)
    """
    return tuple(layer for layer, gone in enumerate(SCHEDULES[reduction], 1) if gone)


def left_of(tokens: int, reduction: int, layer: int) -> int:
    """How many of the ``tokens`` that enter the stage at ``layer`` stay: as large a share as of the schedule's own image."""
    left = [IMAGE - gone for gone in accumulate(SCHEDULES[reduction], initial=0)]
    return min(tokens, max(1, round(tokens * left[layer] / left[layer - 1])))
