"""Groups of tokens of which the device knows how many stay: shares in proportion, clusters around density peaks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import TokenContext
from vlmprune.policies.choose import falling_places, index_of, rank_within, select_counts
from vlmprune.policies.parts.recycle import MOST

NEAR = 7
"""Neighbours that make a density, as released for FlashVID, PruneVid and HoliTom."""


def in_proportion(sizes: Tensor, total: Tensor) -> Tensor:
    """Shares of ``total [...]`` in proportion to ``sizes [..., M]``, both int64: whole numbers that add up to it exactly.

    Each is ``size * total / sum`` rounded up or down: what the groups up to one get together is rounded down. Where ``total``
    is at most the sum, no share is larger than its size.

    Example:
        >>> in_proportion(torch.tensor([3, 3, 4]), torch.tensor(5))
        tensor([1, 2, 2])
    """
    ends = sizes.cumsum(-1) * total[..., None] // sizes.sum(-1, keepdim=True).clamp(min=1)
    return ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1]))


def best_of_groups(
    ctx: TokenContext, scores: Tensor, groups: Tensor, many: int, keep: float | Sequence[int]
) -> Tensor:
    """The tokens of highest ``scores [B, N]`` of each of ``many`` groups, ``groups [B, N]`` their numbers: ``[B, K]``.

    Of m tokens ``int(keep m)``, and one of a sample at least, which takes one host read; or, where ``keep`` is a number for
    each sample, exactly so many, shared out over its groups in proportion to their sizes.
    """
    sizes = groups.new_zeros(len(groups), many).scatter_add(1, groups, ctx.mask.long())
    own = rank_within(scores.masked_fill(~ctx.mask, float("-inf")), groups)
    if not isinstance(keep, float):
        counts = in_proportion(sizes, whole_numbers(tuple(keep), ctx.device))
        return select_counts(((own < counts.gather(1, groups)) & ctx.mask).float(), ctx, keep)
    stays = (own < (sizes.double() * keep).long().gather(1, groups)) & ctx.mask
    best = (falling_places(scores, ctx.mask) == 0) & ctx.mask
    return index_of(stays | (best & ~stays.any(1, keepdim=True)))


def density_peaks(x: Tensor, among: Tensor, wanted: Tensor, near: Tensor, most: int) -> Tensor:
    """Clusters around density peaks, each group's own number of them: ``ops.cluster_dpc`` where the device knows how many.

    Distance = L2 / sqrt(D). Density of a token = exp(-mean of its ``near`` smallest squared distances, its own 0 included); its gap
    = distance to the nearest denser one, for the densest the largest of the group. The centres are those of largest density
    * gap; every other token joins its nearest centre. Ties go to the lower place. Never waits for the device.

    Args:
        x: ``[..., P, D]``; what is out of range counts as the nearest in range, NaN as 0.
        among: ``[..., P]`` bool, the tokens to cluster.
        wanted: ``[...]`` int64, how many clusters, at most the group's tokens.
        near: ``[...]`` int64, how many neighbours make a density; of fewer tokens all.
        most: what ``near`` is at most.

    Returns:
        ``[..., P]`` int64, the place of the centre of each token's cluster, its own for a centre; -1 = not among, or no clusters.

    Example:
        >>> line = torch.tensor([[[0.0], [0.1], [5.0], [5.2]]])
        >>> all_of_them = torch.ones(1, 4, dtype=torch.bool)
        >>> density_peaks(line, all_of_them, torch.tensor([2]), torch.tensor([2]), most=2)
        tensor([[0, 0, 2, 2]])
    """
    shape, (P, D), at = among.shape, x.shape[-2:], torch.arange(x.shape[-2], device=x.device)
    x, among = x.reshape(-1, P, D).float().clamp(-MOST, MOST).nan_to_num(0.0), among.reshape(-1, P)
    wanted, near = wanted.reshape(-1), near.reshape(-1)
    pair = among[:, :, None] & among[:, None, :]
    # from differences: equal tokens are 0 apart, and padding changes nothing
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / D**0.5
    apart = distance.masked_fill(~pair, float("inf"))
    k = torch.minimum(near, among.sum(1)).clamp(min=1)[:, None]
    closest = apart.topk(min(most, P), dim=2, largest=False).values.square()
    spread = closest.masked_fill(at[: closest.shape[2]] >= k[:, :, None], 0.0).sum(2) / k
    tighter = spread[:, None, :] < spread[:, :, None]
    denser = pair & (tighter | ((spread[:, None, :] == spread[:, :, None]) & (at < at[:, None])))
    farthest = distance.masked_fill(~pair, 0.0).amax((1, 2))
    gap = distance.masked_fill(~denser, float("inf")).amin(2)
    gap = torch.where(denser.any(2), gap, farthest[:, None])
    # the logarithm of density * gap: the same order, and far tokens do not all underflow to 0
    center = among & (falling_places(gap.log() - spread, among) < wanted[:, None])
    own = center[:, None, :] & (at == at[:, None])
    nearest = distance.masked_fill(~center[:, None, :], float("inf")).masked_fill(own, -1.0).argmin(2)
    return nearest.masked_fill(~(among & center.any(1, keepdim=True)), -1).view(shape)


def means_of(x: Tensor, joined: Tensor) -> Tensor:
    """``[..., P, D]`` the mean of what has ``joined [..., P]`` each place, of ``x [..., P, D]``; zeros where nothing has."""
    P = x.shape[-2]
    means = ops.merge_tokens(x.reshape(-1, P, x.shape[-1]), joined.reshape(-1, P), P)
    return means.view(x.shape)


def blended(x: Tensor, joined: Tensor, own: float) -> Tensor:
    """``x [..., P, D]``, each ``own`` times itself and the rest times the mean of the others that ``joined [..., P]`` it, if any."""
    others = joined.masked_fill(joined == torch.arange(x.shape[-2], device=x.device), -1)
    some = torch.zeros_like(joined).scatter_add(-1, others.clamp(min=0), (others >= 0).long()) > 0
    return torch.where(some[..., None], own * x + (1 - own) * means_of(x, others), x)
