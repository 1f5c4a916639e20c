"""Density peaks in some frames of a video's segments, into which the rest of a segment is merged (FastVID's context tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.choose import falling_places
from vlmprune.policies.groups import Counts
from vlmprune.policies.parts.apportion import apportioned
from vlmprune.policies.parts.frames import Frames, Videos, over_runs
from vlmprune.policies.parts.recycle import MOST

NEIGHBORS = 4
"""Which make the density of a token, itself among them."""


def divided(frames: Frames, budgets: Counts, share: float) -> tuple[Counts, Counts]:
    """How many tokens each of the G frames keeps by attention, and at peaks, which are ``share`` of its even part of a budget.

    Where all of an image stays it has no peaks.
    """
    each, sizes = frames.groups.shared_out(budgets).kept, frames.groups.tokens
    whole = [all(each[g] == sizes[g] for g in own) for own in frames.groups.members]
    part = [0.0 if whole[image] else share for image in frames.groups.images]
    peaks = tuple(int(k * some) for k, some in zip(each, part, strict=True))
    return tuple(k - c for k, c in zip(each, peaks, strict=True)), peaks


class Offer(NamedTuple):
    """What the frames of some videos bid for their budgets.

    Attributes:
        rest: ``[I, F, P]`` bool, the tokens that are not kept by attention: peaks, and what goes to them.
        runs: ``[I, F]`` the segments, as ``run_numbers`` gives them.
        scores: ``[I, F, P]`` float32, by which tokens of a frame are kept.
        grants: ``[I, F]`` int64, how many each frame keeps.
        left: ``[I, F]``, how near it is to one more.
    """

    rest: Tensor
    runs: Tensor
    scores: Tensor
    grants: Tensor
    left: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,
        real: Tensor,
        seen: Tensor,
        runs: Tensor,
        salient: Tensor,
        context: Tensor,
        period: int,
        most: int,
    ) -> Self:
        """The tokens most ``seen [I, F, P]`` first, then density peaks.

        Args:
            x: ``[I, F, P, D]``.
            real: ``[I, F, P]`` bool.
            seen: the attention that tokens receive.
            runs: the segments.
            salient, context: ``[I, F]`` int64, as ``divided`` gives them.
            period: as in ``shared_by_period``.
            most: the most tokens that a frame has at peaks; a segment's are those of up to ``period`` frames, and one left over.
        """
        attended = falling_places(seen, real)
        rest = real & (attended >= salient[..., None])
        each, left = shared_by_period(runs, context, period)
        place = by_density(x, rest, attended, min(x.shape[2], period * (most + 1))) if most else attended
        scores = torch.where(rest, -1 - place, -attended / x.shape[2]).float()
        return cls(rest, runs, scores, salient + each, left)


def taken(frames: Frames, parts: Sequence[Videos], offers: Sequence[Offer]) -> Tensor:
    """Scores ``[B, N]`` float32 for ``ranked``, by which every video's budget is spent on what its frames offer."""
    columns = zip(*((offer.scores, offer.grants, offer.left) for offer in offers), strict=True)
    return apportioned(frames.groups, *(frames.by_frame(parts, column) for column in columns))


def shared_by_period(runs: Tensor, budget: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """What a segment's frames have, ``budget [I, F]``, shared out evenly over its last frame and every ``period``-th before it.

    Returns:
        ``[I, F]`` int64 what each frame gets, rounded down, and how near it is to one more: -1 = it is to have none.
    """
    lengths = over_runs(torch.ones_like(runs), runs).long()
    total = over_runs(budget, runs).long().gather(1, runs)
    to_end = lengths.cumsum(1).gather(1, runs) - 1 - torch.arange(runs.shape[1], device=runs.device)
    chosen = to_end % period == 0
    parts = (lengths.gather(1, runs) + period - 1).div(period, rounding_mode="floor")
    each = torch.where(chosen, total.div(parts, rounding_mode="floor"), 0)
    return each, torch.where(chosen, total % parts / parts, -1.0)


def by_density(x: Tensor, rest: Tensor, attended: Tensor, most: int) -> Tensor:
    """Place ``[..., P]`` of each token in its frame's order of density peaks among the ``rest``; behind ``most`` by attention.

    Args:
        x: ``[..., P, D]``.
        rest: ``[..., P]`` bool.
        attended: ``[..., P]`` int64, the tokens' places by attention.
        most: how many peaks are found.
    """
    P = x.shape[-2]
    finite = x.reshape(-1, P, x.shape[-1]).float().clamp(-MOST, MOST).nan_to_num(0.0)
    centers = ops.cluster_dpc(finite, most, neighbors=min(NEIGHBORS, P), mask=rest.reshape(-1, P))[1]
    spot = torch.where(centers < 0, P, centers)
    order = torch.arange(most, device=x.device).expand_as(spot)
    return pad(attended.reshape(-1, P) + most, (0, 1)).scatter(1, spot, order)[:, :-1].view(rest.shape)


def merged_into_peaks(x: Tensor, offer: Offer, kept: Tensor, counts: Counts, own: float) -> Tensor:
    """``x [I, F, P, D]``, a peak's row ``w`` times itself and ``1 - w`` times the mean of what goes to it, itself among them.

    In each frame with peaks every token of the ``rest`` of its segment goes to the one of highest cosine, the first of equals.
    ``w`` is the larger of ``own`` and one over one more than the tokens that go to it.

    Args:
        x: hidden states.
        offer: the rest, and the segments.
        kept: ``[I, F, P]`` bool; those of the rest are peaks.
        counts: how many peaks each of the I videos has.
        own: a share.
    """
    (_, F, P, D), rows, runs = x.shape, x.float().flatten(1, 2), offer.runs
    rest = offer.rest.flatten(1)
    at = ops.select_topk((kept.flatten(1) & rest).float(), whole_numbers(counts, x.device))[0][
        :, : max(counts)
    ]
    spot = at.clamp(min=0)
    target = rows.gather(1, spot[..., None].expand(-1, -1, D))
    alike = normalize(rows, dim=-1) @ normalize(target, dim=-1).mT
    takes = _best_in_frame(alike, torch.where(at < 0, F, spot // P), F)
    run = runs.repeat_interleave(P, dim=1)
    same = run[:, :, None] == run.gather(1, spot)[:, None]
    takes &= rest[:, :, None] & same & (at >= 0)[:, None]
    count = takes.sum(1)[..., None]
    mean = takes.float().mT @ rows / count.clamp(min=1)
    weight = (1 / (count + 1.0)).clamp(min=own)
    new = torch.where(count > 0, weight * target + (1 - weight) * mean, target)
    spare = torch.cat([rows, rows[:, :1]], 1)  # its last row takes what is no peak
    put = torch.where(at < 0, F * P, at)[..., None].expand(-1, -1, D)
    return spare.scatter(1, put, new)[:, :-1].to(x.dtype).view(x.shape)


def _best_in_frame(alike: Tensor, frame: Tensor, frames: int) -> Tensor:
    """``[I, N, T]`` whether each target is the most alike of those in its ``frame [I, T]``, the first of equals."""
    of = frame[:, None].expand_as(alike)
    shape = (*alike.shape[:2], frames + 1)
    best = alike.new_full(shape, float("-inf")).scatter_reduce(2, of, alike, "amax")
    number = torch.arange(alike.shape[2], device=alike.device)
    those = torch.where(alike >= best.gather(2, of), number, alike.shape[2])
    first = those.new_full(shape, alike.shape[2]).scatter_reduce(2, of, those, "amin")
    return first.gather(2, of) == number
