"""Budgets that the data share out: how many tokens of every group stay is decided on the device, exactly so many in all."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from vlmprune.policies.base import Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import ranked
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


def ranked_by_grants(
    ctx: TokenContext,
    policy: PruningPolicy,
    groups: Groups,
    scores: Tensor,
    grants: Tensor,
    weights: Tensor,
    positions: Positions = "keep",
) -> Ranking:
    """``ranked`` by what is ``apportioned``; tokens of score -inf come last of all.

    Args:
        ctx: the stage's context.
        policy: whose ``kept`` counts.
        groups, grants, weights: as in ``apportioned``.
        scores: ``[B, N]``, of which the higher survives within its group.
        positions: of the tokens that stay.
    """

    def behind(last: Tensor) -> Ranking:
        left = scores.masked_fill(last, float("-inf"))
        return ranked_by_grants(ctx, policy, groups, left, grants, weights, positions)

    by = apportioned(groups, groups.split(scores), grants, weights)
    by = by.masked_fill(scores == float("-inf"), float("-inf"))
    return replace(ranked(ctx, policy, by, positions), again=behind)


def shared_out(members: Tensor, standing: Tensor, keep: int, budget: int) -> Tensor:
    """How many of each group ``[I, q]`` stay, ``keep`` in all, by how many of it are standing (PruneSID).

    Of every group that has members one stays; the rest is in proportion to the standing ones, their running sums rounded, up
    to a bound: as many as are standing, at most 5 for every 64 of the budget begun, raised by one and another one until the
    bounds add up to the budget. What is then missing goes to the groups of most standing ones.

    Args:
        members: how many it has.
        standing: how many of them no other one has made superfluous.
        keep: at least as many as groups have members.
        budget: what the bounds are made for.
    """
    least = members.clamp(max=1)
    most = torch.minimum(members, standing.clamp(max=5 * math.ceil(budget / 64)))
    raised = torch.minimum(
        most[:, None] + torch.arange(budget + 1, device=most.device)[:, None], members[:, None]
    )
    short = (raised.sum(2, keepdim=True) < budget).sum(1, keepdim=True)
    most = raised.gather(1, short.expand(-1, -1, most.shape[1]))[:, 0]
    rest = keep - least.sum(1, keepdim=True)
    shares = standing.cumsum(1).double() / standing.sum(1, keepdim=True).clamp(min=1) * rest
    ends = shares.round().long()
    stay = torch.minimum(least + ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1])), most)
    turn = standing.argsort(dim=1, descending=True, stable=True)
    room = (most - stay).gather(1, turn)
    missing = keep - stay.sum(1, keepdim=True) - (room.cumsum(1) - room)
    return stay.scatter_add(1, turn, torch.minimum(missing.clamp(min=0), room))
