"""What is dropped, merged into the most similar of what stays; and crops of which some tokens are kept and others made anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import Positions, Reduction, TokenContext
from vlmprune.policies.by_image import gathered, nearest, rows_at
from vlmprune.policies.choose import others
from vlmprune.policies.groups import Counts, Groups, Kind, Quota


def kept_and_made(
    ctx: TokenContext,
    crops: Groups,
    quota: Quota,
    positions: Positions,
    choose: Callable[[Kind, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]],
    *more: Counts,
) -> Tensor | Reduction:
    """Of every crop some tokens as they are, and others that hold something new.

    Args:
        ctx: the stage's context.
        crops: where the crops lie.
        quota: how many tokens stay.
        positions: "pack" (what is made stands behind what is kept) or "keep".
        choose: of the crops of one kind, whose hidden states ``[i, T, D]`` it is given, too, the places ``[i, a]`` of tokens
            that are kept, those ``[i, c]`` of others, what these hold now, ``[i, c, D]``, and into which place every token was
            merged, ``[i, T]``, -1 = into none.
        more: numbers of every crop, by which kinds differ, too.
    """
    hidden = crops.split(ctx.given("hidden"))

    def chosen(kind: Kind) -> tuple[Tensor, ...]:
        own = crops.take(hidden, kind)
        kept, places, made, into = choose(kind, own)
        picked = torch.cat([kept, places], 1)
        rows = torch.cat([rows_at(own, kept), made.to(own.dtype)], 1)
        if positions == "keep":
            picked, order = picked.sort(dim=1)
            rows = rows_at(rows, order)
        return picked, rows, into

    picked, rows, into = crops.by_kind(quota, chosen, *more)
    return gathered(ctx, crops, quota, picked, positions, rows, into)


def averaged_with_nearest(rows: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each row that stays and of all dropped rows that are most cosine-similar to it.

    Args:
        rows: ``[I, P, D]``.
        stays: ``[I, k]`` int64, places of those that stay.

    Returns:
        Rows ``[I, k, D]``, and into which place each token was merged, ``[I, P]`` int64, -1 = into none.

    Example:
        >>> averaged_with_nearest(torch.tensor([[[2.0, 0], [0, 1], [4, 0]]]), torch.tensor([[0, 1]]))
        (tensor([[[3., 0.],
                 [0., 1.]]]), tensor([[-1, -1,  0]]))
    """
    P, k = rows.shape[1], stays.shape[1]
    if k in (0, P):  # nothing to merge into, or nothing to merge
        return rows[:, :k], _nowhere(rows)
    dropped = others(stays, P)
    joins, into = _joined(rows, dropped, stays)
    own = torch.arange(k, device=stays.device).expand_as(stays)
    slot = torch.zeros_like(into).scatter(1, stays, own).scatter(1, dropped, joins)
    return ops.merge_tokens(rows, slot, k, mode="mean"), into


def merged_targets(
    features: Tensor, keys: Tensor, dominant: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, at equal steps from the first of all tokens but the dominant ones, into which the others are merged (VisionZip).

    Of R tokens every ``floor(R / count)``-th is a target. To it is added the mean of those others whose keys are most
    cosine-similar to its own.

    Args:
        features: ``[I, P, Dv]``, what is averaged and added.
        keys: ``[I, P, D]``.
        dominant: ``[I, d]`` int64, places of tokens that take no part.
        count: how many targets there are; no more than there are tokens.

    Returns:
        Their places ``[I, c]`` int64, their features ``[I, c, Dv]``, and into which place each token was merged, ``[I, P]``
        int64, -1 = into none.
    """
    rest = others(dominant, keys.shape[1])
    count = min(count, rest.shape[1])
    if count == 0:
        return rest[:, :0], features[:, :0], _nowhere(keys)
    targets = rest[:, :: rest.shape[1] // count][:, :count]
    followers = others(torch.cat([dominant, targets], 1), keys.shape[1])
    joins, into = _joined(keys, followers, targets)
    mean = ops.merge_tokens(rows_at(features, followers), joins, count, mode="mean")
    return targets, rows_at(features, targets) + mean, into


def _joined(keys: Tensor, dropped: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Of each dropped token the number ``[I, R]`` of the nearest that stays; and into which place each goes, ``[I, P]``."""
    joins = nearest(rows_at(keys, dropped), rows_at(keys, stays))
    return joins, _nowhere(keys).scatter(1, dropped, stays.gather(1, joins))


def _nowhere(x: Tensor) -> Tensor:
    return torch.full(x.shape[:2], -1, dtype=torch.int64, device=x.device)
