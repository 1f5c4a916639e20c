"""Attention row by row, of many rows: what an op reduces within each head, for methods that join the heads before the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.choose import marks
from vlmprune.policies.inputs import AttentionInputs

MOST = 1 << 24
"""Entries of attention, heads counted, that are held at once: 64 MiB."""


def attention_maps(
    seen: AttentionInputs, rows: Tensor, heads: Literal["mean", "max"], most: int = MOST
) -> Iterator[tuple[slice, Tensor]]:
    """The attention that ``rows`` pay to the visual columns, heads joined, some rows at a time.

    Args:
        seen: query and key.
        rows: key positions ``[B, R]``, -1 = padding.
        heads: how the heads of all ranks are joined, entry by entry.
        most: how many entries may be held at once; of one row there are ``B H N``.

    Yields:
        Which rows, and their map ``[B, r, N]`` float32: softmax over the whole row; 0 at padding, and where a row does not
        see the column.
    """
    (B, H, Sq, D), (groups, S), N = seen.query.shape, seen.key.shape[1:3], seen.columns.shape[1]
    key = ops.gather_tokens([seen.key.transpose(1, 2).flatten(2)], seen.columns)[0].float()
    key = key.view(B, N, groups, 1, D).permute(0, 2, 3, 4, 1)
    step = max(1, most // max(1, B * H * N))
    for start in range(0, rows.shape[1], step):
        some = rows[:, start : start + step]
        lse = ops.row_lse(seen.query, seen.key, some, key_mask=seen.key_mask, scale=seen.scale)
        at = torch.where(some >= 0, some - (S - Sq), -1)
        query = ops.gather_tokens([seen.query.transpose(1, 2).flatten(2)], at)[0].float()
        query = query.view(B, -1, groups, H // groups, D).permute(0, 2, 3, 1, 4)
        logits = (query @ key).flatten(1, 2) * seen.scale
        sees = (seen.columns[:, None] >= 0) & (seen.columns[:, None] <= some[..., None])
        paid = (logits - lse[..., None]).masked_fill(~sees[:, None], -torch.inf).exp()
        joined = paid.mean(1) if heads == "mean" else paid.amax(1)
        yield slice(start, start + step), seen.across_ranks(joined, heads)


def text_times_image(seen: AttentionInputs) -> Tensor:
    """``[B, N]`` float32: what the text behind the last image pays to each visual token, times what visual tokens pay.

    Both are sums over these of the listed rows, of the largest of all heads. Where there is no such text it counts as 1.
    """
    rows, columns = seen.rows, seen.columns
    if not columns.shape[1]:
        return columns.float()
    real = rows >= 0
    text = real & (rows > columns.amax(1, keepdim=True))
    visual = real & marks(columns, seen.key.shape[2]).gather(1, rows.clamp(min=0))
    kinds = torch.stack([text, visual], 1).float()
    paid = torch.zeros(len(rows), 2, columns.shape[1], device=rows.device)
    for some, joined in attention_maps(seen, rows, "max"):
        paid += kinds[..., some] @ joined
    by_text, by_image = paid.unbind(1)
    return torch.where(text.any(1, keepdim=True), by_text, 1.0) * by_image


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
