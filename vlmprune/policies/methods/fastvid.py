"""FastVID: by segments of a video, the attended tokens of every frame, and density peaks into which the rest is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext, outcome
from vlmprune.policies.by_image import ranked, vision_of
from vlmprune.policies.checks import check_keep, check_share, check_whole
from vlmprune.policies.choose import falling_places, marks
from vlmprune.policies.groups import Counts
from vlmprune.policies.parts.apportion import apportioned
from vlmprune.policies.parts.frames import Frames, budgets_of, frame_means, frames_of, over_runs, run_numbers
from vlmprune.policies.parts.recycle import MOST

NEIGHBORS = 4
"""Which make the density of a token, itself among them."""


class Shares(NamedTuple):
    """What each of the G frames of a batch keeps of its budget.

    Attributes:
        salient: tokens by attention.
        context: tokens at density peaks, before a segment gathers them in a few of its frames.
    """

    salient: Counts
    context: Counts


@dataclass(frozen=True)
class FastVID(PruningPolicy):
    """Cuts a video into segments, keeps the tokens most attended to in every frame, and merges the rest of a segment into
    density peaks of some of its frames (DySeg, ATS and DTM in the paper).

    A segment ends where the frames' mean tokens differ: at the ``segments - 1`` least alike neighbours, and wherever their cosine
    is below ``threshold``. Every frame has an equal part of the budget, of which ``context`` is for peaks. Those of a segment
    go to its last frame and to every ``period``-th before that, in equal parts. A peak is a token that few denser ones
    are near to, among those of its frame that attention has not kept; for each of these frames all such tokens of the segment go
    to its most cosine-similar peak, whose hidden state becomes ``w`` times its own plus ``1 - w`` times their mean (its own among
    them), ``w`` the larger of ``own`` and one over one more than their number.

    What the released code is for LLaVA-OneVision, this is by its quotas and its merging. There attention and what frames
    are compared by come from SigLIP's pooling head, which the model does not have; they are the mean attention over
    rows (or CLS) and the mean token instead, as in its code for Qwen2.5-VL. (That one also passes over frames above a cosine of
    0.95, which is left out here.) There a remainder of a segment's peaks is lost, and densities have random noise added; here the
    count is exact, what is left goes to the peaks' frames by remainders, and of equal densities the earlier token's is higher.
    A frame that cannot take its peaks, where the released code fails, leaves them to the others. A newline token goes first. A
    single image is one segment of one frame; every tile and the small view of one that is cut up is a frame.

    Args:
        keep: share of a video's tokens (float; the paper's 0.1) or tokens per video (int).
        segments: a video's segments at least, c in the paper, of as many frames.
        threshold: cosine of two frames below which a new segment begins, the paper's tau, in [0, 1]; 0.84 in the released code
            for Qwen2.5-VL.
        context: share of the budget that goes to density peaks, d in the paper, in [0, 1].
        period: every how many frames of a segment one has its peaks, p in the paper.
        own: how much of itself a peak keeps at least, the released beta, in [0, 1].
        vision_layer: vision-tower layer whose attention is read.
        positions: ``"keep"`` their own (released code), or ``"pack"``: what stays stands at 0, 1, 2, ...
    """

    summary = "a video's segments: most attended tokens, and density peaks into which the rest is merged"
    paper = "FastVID: Dynamic Density Pruning for Fast Video Large Language Models (NeurIPS 2025), arXiv 2503.11187"
    formula = (
        "segments begin where cos of neighbouring frames' mean x_j < threshold or of the segments - 1 lowest\n"
        "of each frame keep the (1 - context) k / F highest mean_h V[vision_layer][h, CLS, j],  F = frames\n"
        "of its rest  d_ij = |x_i - x_j| / √D, D = columns;  p_j = exp(-mean of the 4 smallest d_ij²)\n"
        "s_j = p_j min_{p_i > p_j} d_ij;  keep the context · k highest, all in each segment's last frame, the\n"
        "period-th before it, …;  r = how many of the segment's rest are most cos-similar to j in its frame,\n"
        "m_j = their mean;  x_j ← w x_j + (1 - w) m_j,  w = max(own, 1 / (r + 1))"
    )
    checked = "reading"
    for_video = True
    growth = "n^2"  # densities take all pairs of a frame

    keep: int | float = 0.1
    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    period: int = 4
    own: float = 0.6
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_whole("segments", self.segments, 1)
        check_share("threshold", self.threshold)
        check_share("context", self.context)
        check_whole("period", self.period, 1)
        check_share("own", self.own)
        check_whole("vision_layer", self.vision_layer)

    layers = (0,)  # before the language model
    spend = "image"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        frames, device = frames_of(ctx), ctx.device
        if not frames.most:
            return ctx.ordinals
        hidden = ctx.given("hidden")
        rows, real = frames.groups.split(hidden), frames.flat(frames.real(device))
        shares = self._shares(frames, budgets_of(ctx, self))
        attended = falling_places(vision_of(ctx, self.vision_layer, frames.groups).received(), real)
        salient = whole_numbers(shares.salient, device)
        rest = real & (attended >= salient[:, None])
        runs = self._runs(frame_means(frames.lay(rows), frames.lay(real)), frames.there(device))
        each, left = self._peaks(runs, frames.lay(whole_numbers(shares.context, device)))
        sums = tuple(sum(shares.context[g] for g in own) for own in frames.groups.members)
        most = min(rows.shape[1], self.period * (max(shares.context) + 1))
        place = _by_peaks(rows, rest, attended, most) if any(sums) else attended
        scores = torch.where(rest, -1 - place, -attended / real.shape[1]).float()
        by = apportioned(frames.groups, scores, salient + frames.flat(each), frames.flat(left))
        index = ranked(ctx, self, by, self.positions).index(ctx)
        if not any(sums):
            return outcome(index, self.positions)
        peaks = frames.groups.split(marks(index, ctx.mask.shape[1])) & rest
        merged = self._merged(frames, rows, rest, peaks, runs, sums)
        return outcome(index, self.positions, ops.gather_tokens([_put(frames, merged, hidden)], index)[0])

    def _shares(self, frames: Frames, budgets: Counts) -> Shares:
        """Where all of an image stays, nothing is merged."""
        each = frames.groups.shared_out(budgets).kept
        whole = [all(each[g] == frames.groups.tokens[g] for g in own) for own in frames.groups.members]
        part = [0.0 if done else self.context for done in whole]
        context = tuple(int(k * part[image]) for k, image in zip(each, frames.groups.images, strict=True))
        return Shares(tuple(k - c for k, c in zip(each, context, strict=True)), context)

    def _runs(self, means: Tensor, there: Tensor) -> Tensor:
        """Which segment each frame is in, ``[I, F]``, by the frames' mean tokens ``[I, F, D]``."""
        alike = cosine_similarity(means[:, 1:], means[:, :-1], dim=-1)
        alike = alike.nan_to_num(2.0).masked_fill(~there[:, 1:], 2.0)
        least = falling_places(-alike, there[:, 1:]) < self.segments - 1
        starts = there.clone()
        starts[:, 1:] &= least | (alike < self.threshold)
        return run_numbers(starts, there)

    def _peaks(self, runs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Of each frame ``[I, F]``, how many peaks it has, int64, and how near it is to one more: -1 = it is to have none."""
        there = runs >= 0
        run = runs.clamp(min=0)
        lengths = over_runs(there, runs).long()
        total = over_runs(context, runs).long().gather(1, run)
        to_end = lengths.cumsum(1).gather(1, run) - 1 - torch.arange(runs.shape[1], device=runs.device)
        chosen = there & (to_end % self.period == 0)
        parts = (
            (lengths.gather(1, run) + self.period - 1).div(self.period, rounding_mode="floor").clamp(min=1)
        )
        each = torch.where(chosen, total.div(parts, rounding_mode="floor"), 0)
        return each, torch.where(chosen, total % parts / parts, -1.0)

    def _merged(
        self, frames: Frames, rows: Tensor, rest: Tensor, peaks: Tensor, runs: Tensor, sums: Counts
    ) -> Tensor:
        """``rows [G, P, D]`` with those of the ``peaks [G, P]``, ``sums`` of each video, merged with the ``rest`` [G, P]."""
        P, most = rows.shape[1], max(sums)
        x, sources, wanted = (frames.lay(t).flatten(1, 2) for t in (rows, rest, peaks))
        x = x.float()
        at = ops.select_topk(wanted.float(), whole_numbers(sums, x.device))[0][:, :most]
        spot = at.clamp(min=0)
        target = x.gather(1, spot[..., None].expand(-1, -1, x.shape[2]))
        frame = torch.where(at < 0, runs.shape[1], spot // P)
        alike = normalize(x, dim=-1) @ normalize(target, dim=-1).mT
        takes = _best_in_frame(alike, frame, runs.shape[1])
        run = runs.repeat_interleave(P, dim=1)
        takes &= sources[:, :, None] & (run[:, :, None] == run.gather(1, spot)[:, None]) & (at >= 0)[:, None]
        count = takes.sum(1)[..., None]
        mean = takes.to(x.dtype).mT @ x / count.clamp(min=1)
        weight = (1 / (count + 1.0)).clamp(min=self.own)
        new = torch.where(count > 0, weight * target + (1 - weight) * mean, target)
        spare = torch.cat([x, x[:, :1]], 1)  # its last row takes what is no peak
        put = torch.where(at < 0, x.shape[1], at)[..., None].expand(-1, -1, x.shape[2])
        done = spare.scatter(1, put, new)[:, :-1].to(rows.dtype)
        return frames.flat(done.view(*runs.shape, P, -1))


def _by_peaks(rows: Tensor, rest: Tensor, attended: Tensor, most: int) -> Tensor:
    """Place ``[G, P]`` of each token in its frame's order of density peaks; behind the first ``most`` by attention."""
    finite = rows.float().clamp(-MOST, MOST).nan_to_num(0.0)
    near = min(NEIGHBORS, rows.shape[1])
    centers = ops.cluster_dpc(finite, most, neighbors=near, mask=rest)[1]
    place = torch.nn.functional.pad(attended + most, (0, 1))
    spot = torch.where(centers < 0, rows.shape[1], centers)
    order = torch.arange(most, device=rows.device).expand_as(spot)
    return place.scatter(1, spot, order)[:, :-1]


def _best_in_frame(alike: Tensor, frame: Tensor, frames: int) -> Tensor:
    """``[I, N, T]`` whether each target is the most alike of those in its ``frame [I, T]``, the first of equals."""
    of = frame[:, None].expand_as(alike)
    shape = (*alike.shape[:2], frames + 1)
    best = alike.new_full(shape, float("-inf")).scatter_reduce(2, of, alike, "amax")
    number = torch.arange(alike.shape[2], device=alike.device)
    those = torch.where(alike >= best.gather(2, of), number, alike.shape[2])
    first = those.new_full(shape, alike.shape[2]).scatter_reduce(2, of, those, "amin")
    return first.gather(2, of) == number


def _put(frames: Frames, rows: Tensor, hidden: Tensor) -> Tensor:
    """``rows [G, P, D]`` in their places of ``hidden [B, N, D]``; what is of no frame stays as it is."""
    inside = frames.groups.spread(torch.ones_like(rows[..., :1], dtype=torch.bool))
    return torch.where(inside, frames.groups.spread(rows), hidden)
