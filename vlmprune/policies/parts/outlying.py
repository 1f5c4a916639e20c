"""What stays of every crop where outliers may decide how many do, and one more token that stands for all the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import counting
from vlmprune.errors import require
from vlmprune.policies.base import Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.by_image import gathered, quota_of, rows_at
from vlmprune.policies.choose import marks
from vlmprune.policies.groups import Groups, Kind, Quota

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

    def in_turn(self, turn: Tensor) -> Picked:
        """The same, the chosen tokens no more ascending but in the order of their ``turn [i, T]``."""
        order = turn.gather(1, self.first.clamp(min=0)).argsort(dim=1)
        return self._replace(first=self.first.gather(1, order))

    def mean_of_rest(self, x: Tensor) -> Tensor:
        """``[i, 1, D]`` float32, the mean of those rows of ``x [i, T, D]`` that go."""
        rest = torch.where(self.stays, -1, 0)
        return ops.merge_tokens(x.float().contiguous(), rest, 1)  # a tower's rows may lie across one another

    def into_rest(self) -> Tensor:
        """Into which place every token goes if the rest is merged, ``[i, T]`` int64: that of the rest; -1 = into none."""
        if self.rest is None:
            return torch.full_like(self.stays, -1, dtype=torch.int64)
        return torch.where(self.stays, -1, self.rest).scatter(1, self.rest, -1)


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


def turns(paid: Tensor, most: int | None, spaced: bool) -> Tensor:
    """When each token's turn to stay is, ``[i, T]`` int64: by attention, from T on evenly spaced ones, from 2 T on the others.

    Args:
        paid: ``[i, T]``, the attention.
        most: how many come before the others; None = the outliers do, or the best token where there is none.
        spaced: whether spaced ones come before the others, too: half of ``most``, in place of the last by attention, in the
            middles of equal parts; or with c outliers every ``floor(T / c / 3)``-th.
    """
    T, (outlier, rank) = paid.shape[1], outliers(paid)
    at, late = counting(1, T, paid.device), 2 * T + rank
    count: int | Tensor
    if most is None:
        count = outlier.sum(1, keepdim=True).clamp(min=1)
        even = at % (T // count // 3).clamp(min=1) == 0
    else:
        some = most // 2 if spaced else 0
        count = most - some
        even = (2 * some * at + T - 1) % (2 * T) >= 2 * (T - some)  # (2 i + 1) T // (2 some) for each i
    late = torch.where(even, T + at, late) if spaced else late
    return torch.where(rank < count, rank, late)


def summed(picked: Picked, paid: Tensor, features: Tensor, keys: Tensor, neighbours: int) -> Tensor:
    """Each chosen token with those most like it added, and the sum of the rest: features ``[i, k, Dv]`` float32 (PruMerge).

    Args:
        picked: what stays.
        paid: ``[i, T]``, by which a token's features are multiplied where they are added.
        features: ``[i, T, Dv]``.
        keys: ``[i, T, D]``, by whose cosine tokens are alike.
        neighbours: how many others each of them gains, chosen or not.
    """
    features, unit, T = features.float(), normalize(keys.float(), dim=-1), paid.shape[1]
    cosine = picked.of(unit) @ unit.mT
    itself = picked.first.clamp(min=0)[..., None]
    cosine = cosine.scatter(2, itself, float("-inf"))
    near, _ = ops.select_topk(cosine.flatten(0, 1), min(neighbours, T - 1))
    weight = paid[:, None].masked_fill(~marks(near, T).view_as(cosine), 0.0)
    merged = picked.of(features) + weight @ features
    if picked.rest is None:
        return merged
    gone = paid.masked_fill(picked.stays, 0.0)[:, None]
    return torch.cat([merged, gone @ features], 1)


def with_rest(
    ctx: TokenContext,
    policy: PruningPolicy,
    crops: Groups,
    positions: Positions,
    choose: Callable[[Kind], tuple[Picked, Tensor]],
    merged: bool = False,
) -> Reduction:
    """What stays of every crop and the one for its rest, as many as the policy keeps, or at most so many where the data decide.

    Args:
        crops: where the crops lie.
        positions: "pack" or "keep".
        choose: what stays of the crops of one kind, and what its ``places`` hold then, ``[i, k, D]``.
        merged: whether what goes is merged into the one for the rest, and into nothing else.
    """

    def chosen(kind: Kind) -> tuple[Tensor, ...]:
        picked, rows = choose(kind)
        return (picked.places(), rows, picked.into_rest()) if merged else (picked.places(), rows)

    quota = budget(ctx, policy, crops)
    places, *rows_and_into = crops.by_kind(quota, chosen)
    choice = gathered(ctx, crops, quota, places, positions, *rows_and_into)
    return in_raster_order(choice, policy.fixed_count)


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
