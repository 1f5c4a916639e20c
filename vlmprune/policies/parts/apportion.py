"""Budgets that the data share out: how many tokens of every group stay is decided on the device, exactly so many in all."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.policies.choose import falling_places
from vlmprune.policies.groups import Groups


def apportioned(groups: Groups, scores: Tensor, grants: Tensor, weights: Tensor) -> Tensor:
    """Scores by which the best of a prompt are the best of each group: as many as granted, then one each, round by round.

    The t-th best token of group i stands in slot t. Slots that are granted come first, in the order of the prompt; then, of
    every group that has one, its first slot beyond the grant, the heaviest group's before the others; then its second, and so
    on. So a count that the grants do not add up to, or that a small group cannot take, is met without asking the device.

    Args:
        groups: I groups of up to T tokens.
        scores: ``[I, T]``, of which the higher survives; ties go to the lower number, NaN ranks below everything.
        grants: ``[I]`` int64, how many tokens of each group stay.
        weights: ``[I]``, who gets what is left over; ties go to the lower number, NaN counts as none.

    Returns:
        ``[B, N]`` float32 for ``ranked``; tokens of no group come last.

    Example:
        >>> from vlmprune.policies import Random, crops_of, ranked
        >>> best = torch.tensor([[4.0, 3, 2, 1]]).expand(3, 4)  # crops of two samples: one of the first, two of the second
        >>> by = apportioned(crops_of(ctx), best, torch.tensor([2, 1, 3]), torch.tensor([1.0, 1, 2]))
        >>> ranked(ctx, Random(keep=3, spend="prompt"), by).index(ctx)[1].tolist()
        [0, 1, 4, 5, 6, 7]
    """
    heavy = weights.double().nan_to_num(float("-inf"), neginf=float("-inf"))
    turn = heavy.argsort(descending=True, stable=True).argsort()
    real = groups.padding(scores.device)
    slot = falling_places(scores, torch.ones_like(scores, dtype=torch.bool) if real is None else real)
    later = (slot - grants[:, None]) * len(turn) + turn[:, None] + 1
    return groups.spread(-later.clamp(min=0).float(), fill=float("-inf"))
