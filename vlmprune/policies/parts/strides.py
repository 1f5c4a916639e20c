"""Tokens at equal steps, from the first one on: k of n at ``i floor(n / k)``, i = 0 ... k - 1."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.constants import remembered


@remembered()
def stride_scores(
    images: tuple[tuple[int, ...], ...], counts: tuple[tuple[int, ...], ...], device: torch.device
) -> Tensor:
    """float32 ``[B, N]``: the best ``counts[b][i]`` of the tokens of each image are those at equal steps.

    1 at every step of every image of every sample, elsewhere 0: of equal scores the first ones stay.

    Args:
        images: per sample, the tokens of each of its images.
        counts: how many of them stay, at least one.
        device: where the scores go.
    """
    scores = torch.zeros(len(images), max(map(sum, images), default=0))
    for row, sizes, own in zip(scores, images, counts, strict=True):
        first = 0
        for n, count in zip(sizes, own, strict=True):
            row[first : first + n : n // count] = 1
            first += n
    return scores.to(device)
