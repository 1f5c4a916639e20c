"""What stays of every crop where outliers may decide how many do, and one more token that stands for all the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import counting
from vlmprune.errors import require
from vlmprune.policies.base import PruningPolicy, Reduction, TokenContext, VisionAttention
from vlmprune.policies.by_image import quota_of, rows_at
from vlmprune.policies.choose import marks
from vlmprune.policies.groups import Groups, Quota

FENCE = 1.5
"""An outlier is above the third quartile by more than so many times what lies between the quartiles."""


class Picked(NamedTuple):
    """What stays of i crops of T tokens.

    Attributes:
        first: ``[i, m]`` int64, the places of the tokens chosen, ascending, with -1 for those that are one too many.
        stays: ``[i, T]`` bool, the same as marks.
        rest: ``[i, 1]`` int64, the place of the last token that goes: there the one for the rest stands; None = there is none.
    """

    first: Tensor
    stays: Tensor
    rest: Tensor | None

    def places(self) -> Tensor:
        """``[i, k]``: the chosen ones, then the one for the rest."""
        return self.first if self.rest is None else torch.cat([self.first, self.rest], 1)

    def of(self, x: Tensor) -> Tensor:
        """Rows ``[i, m, D]`` of ``x [i, T, D]`` at the places chosen; at -1 any."""
        return rows_at(x, self.first.clamp(min=0))


def pick(turn: Tensor, kept: int, limit: int | None = None) -> Picked:
    """Choose of every crop as many tokens as stay, those whose turn comes first, but one: its place is that of the rest.

    The rest has no place where one token stays, or all do.

    Args:
        turn: ``[i, T]`` int64, the lower the sooner, no two of a crop alike.
        kept: how many tokens stay of each.
        limit: tokens whose turn comes so late are not wanted: then ``kept`` is the most that can stay. None = all are.
    """
    T = turn.shape[1]
    more = kept > 1 and (kept < T or limit is not None)
    first, _ = ops.select_topk(-turn.float(), kept - more)
    if limit is not None:
        first = torch.where(turn.gather(1, first) < limit, first, -1)
    stays = marks(first, T)
    last = torch.where(stays, -1, counting(1, T, turn.device)).amax(1, keepdim=True)
    return Picked(first, stays, last if more else None)


def budget(ctx: TokenContext, policy: PruningPolicy, crops: Groups) -> Quota:
    """``quota_of``; where the data decide how many stay, without tokens of no crop (newlines)."""
    quota = quota_of(ctx, policy, crops)
    return quota if policy.fixed_count else quota._replace(rest=(0,) * len(quota.rest))


def in_raster_order(choice: Tensor | Reduction, fixed: bool) -> Reduction:
    """The same with padding on the right, and ascending unless positions are packed.

    Where the number of tokens is not ``fixed`` the list is as long as the fullest sample's: one host read.
    """
    assert isinstance(choice, Reduction)
    hidden = require(choice.hidden, "hidden", "rows")
    index, far = choice.index, torch.iinfo(torch.int64).max
    place = index if choice.positions == "keep" else torch.zeros_like(index)
    order = torch.where(index < 0, far, place).argsort(dim=1, stable=True)
    index, hidden = index.gather(1, order), hidden.gather(1, order[..., None].expand_as(hidden))
    if not fixed:
        most = int((index >= 0).sum(1).max())
        index, hidden = index[:, :most], hidden[:, :most]
    return replace(choice, index=index, hidden=hidden)


def joined_attention(seen: VisionAttention) -> Tensor:
    """As ``received``, with all heads as one: ``softmax(q k^T / sqrt(H D))``; a sum over heads before the softmax."""
    query, key = (x.transpose(1, 2).flatten(2).float() for x in (seen.query, seen.key))
    rows = query[:, :1] if seen.cls else query
    logits = rows @ key.mT * key.shape[2] ** -0.5
    if seen.mask is None:
        paid = logits.softmax(2)[..., int(seen.cls) :]
        return seen.over_rows(paid.sum(1), paid.shape[1])
    share = logits.masked_fill(~seen.mask[:, None], float("-inf")).softmax(2)
    share = share.masked_fill(~seen.mask[:, :, None], 0.0)
    return seen.over_rows(share.sum(1), seen.mask.sum(1, keepdim=True))


def outliers(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ``attention [I, N]`` are outliers above, bool, and everyone's rank, int64, 0 = the highest, ties by place."""
    ordered, order = attention.sort(dim=1, descending=True, stable=True)
    third, first = quantile(ordered, 0.25), quantile(ordered, 0.75)
    numbers = counting(1, order.shape[1], order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, numbers)
    return attention > third + FENCE * (third - first), rank


def quantile(ordered: Tensor, share: float) -> Tensor:
    """What lies after this share of ``ordered [I, N]``, ``[I, 1]``, linear between two numbers."""
    last = ordered.shape[1] - 1
    low = int(share * last)
    here, after = ordered[:, low : low + 1], ordered[:, min(low + 1, last)][:, None]
    return here.lerp(after, share * last - low)
