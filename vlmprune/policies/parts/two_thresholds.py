"""What the text attends to by two thresholds: in all its rows, as a share of what all visual tokens get, or in one row."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.policies.inputs import AttentionInputs
from vlmprune.policies.parts.attention_maps import attention_maps


def below_both(seen: AttentionInputs, of_all: float, of_row: float) -> Tensor:
    """``[B, N]`` bool, which visual tokens reach neither threshold; where no row is listed, none.

    Args:
        seen: query and key, and the rows; attention is the head mean, softmax over the whole row.
        of_all: share of the attention that all visual tokens get of all rows.
        of_row: attention of one row.
    """
    sums, largest = _sum_and_largest(seen)
    return (sums < sums.sum(1, keepdim=True) * of_all) & (largest < of_row)


def over_thresholds(seen: AttentionInputs, of_all: float, of_row: float) -> Tensor:
    """``[B, N]`` float32, how many times each token reaches that threshold that it reaches more times; NaN without rows."""
    sums, largest = _sum_and_largest(seen)
    share = sums / sums.sum(1, keepdim=True)
    return torch.maximum(share / of_all, largest / of_row)


def _sum_and_largest(seen: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``[B, N]`` float32 each, of what the rows pay to each visual token."""
    sums = torch.zeros(seen.columns.shape, device=seen.columns.device)
    largest = sums
    for _, paid in attention_maps(seen, seen.rows, "mean"):
        sums, largest = sums + paid.sum(1), torch.maximum(largest, paid.amax(1))
    return sums, largest
