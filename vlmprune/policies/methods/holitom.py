"""HoliTom: runs of frames chosen for how much of them stands still, that merged over time; then alike tokens merge mid-way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.by_image import vision_of
from vlmprune.policies.checks import check_keep, check_layer, check_number, check_share, check_whole, share_of
from vlmprune.policies.choose import falling_places, marks, select_scores
from vlmprune.policies.counts import keep_count
from vlmprune.policies.parts.frames import cosine_at, frames_of, over_runs, run_numbers
from vlmprune.policies.parts.peaks import density_peaks
from vlmprune.policies.parts.scenes import Scene, settled, totals


@dataclass(frozen=True)
class HoliTom(PruningPolicy):
    """For videos. Stage 1 cuts each into runs of frames so that as much as possible can be merged over time; stage 2 merges.

    A place stands still in a run if its token is like the one before (cosine above ``tau``) in every frame of it; such tokens
    become their mean, at the first frame. The runs are those, of all ways to cut the video, that merge the most tokens
    (dynamic programming; of equal ones the last run is the shortest). All tokens that are left give the same share: of the
    moving tokens of a frame stay those with the most attention in the tower, the merged ones of a run are clustered around
    density peaks (7 neighbours, at most as many as clusters), ``beta`` times the centre plus the rest times the mean of the
    others. Stage 2 keeps the tokens that the last row attends to most; each other one, in order, goes halfway into the
    kept one of most similar hidden states: ``x <- (x + x_j) / 2``.

    An image is a video of one frame: no more than attention chooses then. An image that is cut up is one of several, its small
    view and tiles; frames of other shape begin a run.

    Not as released: the share is rounded so that the total is exact (there up for the moving tokens of each frame, to the
    nearest for the merged ones of each run); where fewer tokens are distinct than shall stay, the first of the tokens that
    stand still stay beside their mean and out of it (there fewer stay); rows stand in raster order (there a run's merged ones first);
    ties of density go to the lower place (there noise decides); a newline token goes.

    Args:
        keep: tokens per image or video (int) or share (float) of stage 1. Released: 0.1 (with ``tau=0.65``), 0.15, 0.2, 0.25.
        then: tokens per image or video (int) or share of the entering ones (float) that stage 2 leaves; 1.0 = none is merged.
        layer: decoder layer of stage 2, at least 1; released 18 of 28.
        tau: cosine above which a token stands still.
        beta: weight of a cluster's centre, in [0, 1].
        longest: frames of a run, at most.
        vision_layer: vision-tower layer whose attention is read; -1 is the one whose output LLaVA-OneVision's projector gets.
        positions: after stage 1: ``"keep"``, a merged token having its first frame's or its centre's, or ``"pack"`` (released
            code).
    """

    summary = "what stands still merged over time, attention and clusters, merging mid-way"
    paper = "HoliTom: Holistic Token Merging for Fast Video Large Language Models (NeurIPS 2025), arXiv 2505.21334"
    formula = (
        "stage 1: cut the video into runs of largest ∑ (m - 1) · (places still in it), m = its frames\n"
        "still: cos(x_j, x of the frame before, same place) > tau all through; those become their mean\n"
        "merged tokens of every run and moving ones of every frame keep k / (all of these) of them\n"
        "moving: highest mean_h V[vision_layer][h, CLS, j]; merged: density peaks i, which the rest joins:\n"
        "x_i ← beta x_i + (1 - beta) · mean of the x_j that join it\n"
        "stage 2: keep the k(then) highest mean_h A[K-1][h, last, i];  nearest x_i ← (x_i + x_j) / 2"
    )
    for_video = True
    growth = "n^2"  # clusters, and what goes is compared with what stays

    keep: int | float = 0.15
    then: int | float = 0.5
    layer: int = 18
    tau: float = 0.8
    beta: float = 0.6
    longest: int = 1024
    vision_layer: int = -1
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_keep(self.then, "then")
        check_layer(self.layer, 1, " (stage 1 is at layer 0)")
        check_number("tau", self.tau)
        check_share("beta", self.beta)
        check_whole("longest", self.longest, 1)
        check_whole("vision_layer", self.vision_layer)

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, self.layer)

    def needs(self, layer: int) -> Needs:
        """Stage 1: a vision layer and the rows. Stage 2: query and key of the layer before it, and the rows."""
        if layer:
            return Needs(hidden=True, attention="previous")
        return Needs(hidden=True, vision=(self.vision_layer,))

    def at(self, share: float) -> Self:
        return replace(self, keep=share_of(share), then=share_of(share))

    def spends(self, layer: int) -> str:
        return "prompt" if layer else "image"

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return keep_count(self.then if layer else self.keep, tokens, images, self.spends(layer))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        return self._merged(ctx) if ctx.layer else self._cut(ctx)

    def _cut(self, ctx: TokenContext) -> Tensor | Reduction:
        frames = frames_of(ctx)
        if not frames.groups.crops:
            return ctx.ordinals
        hidden = ctx.given("hidden")
        x, at = frames.split(hidden), frames.same_place(frames.before(), ctx.device)
        seen = frames.lay(vision_of(ctx, self.vision_layer, frames.groups).received())
        real, there = frames.real(ctx.device), frames.there(ctx.device)
        alike = (frames.split(cosine_at(hidden, at)) > self.tau) & real
        starts = best_cuts(alike, self.longest)
        runs = run_numbers(starts, there)
        scene = Scene(starts, runs, still_in(alike, starts, runs, real), real)
        shares, more = scene.shared_out(totals(ctx, self, frames))
        moving = scene.moving & (falling_places(seen, scene.moving) < shares[..., 1, None])
        means = scene.over_time(x, more)
        wanted = shares[..., 0].flatten()
        lead = scene.lead.flatten(0, 1)
        joined = density_peaks(means.flatten(0, 1), lead, wanted, wanted.clamp(max=7), 7)
        rows = _blended(means.flatten(0, 1), joined, self.beta).view(means.shape)
        joined = joined.view(real.shape)
        peaks = joined == torch.arange(real.shape[2], device=ctx.device)
        return settled(ctx, self, frames, moving | peaks | more, rows, scene.into(joined, more))

    def _merged(self, ctx: TokenContext) -> Tensor | Reduction:
        seen = ctx.given("attention")
        index = select_scores(seen.received(seen.last), ctx, self)
        rows = ctx.given("hidden")
        if index.shape[1] in (0, ctx.mask.shape[1]):  # nothing there, or all of it stays
            return index
        made, merged = _halved(rows, index, ctx.mask)
        return Reduction(index, made, merged=merged)


def best_cuts(alike: Tensor, longest: int) -> Tensor:
    """Where runs begin, ``[I, F]`` bool, so that the most tokens can be merged over time.

    A run of W frames saves W - 1 times the places ``alike [I, F, P]`` (like the frame before) in all but its first frame.
    ``best[i]`` is what the first i frames save at most; of runs that save the same the last one is the shortest.
    """
    videos, F, _ = alike.shape
    frames = torch.arange(F, device=alike.device)
    broken = (
        torch.where(alike, 0, frames[:, None]).cummax(1).values
    )  # the last frame not like the one before it
    held = torch.stack([(broken <= first).sum(2) for first in range(F)], 1)  # [I, first, last]: places
    width = frames - frames[:, None]
    saved = (held * width).masked_fill((width < 0) | (width >= longest), -1)
    best, begin = alike.new_zeros(videos, F + 1, dtype=torch.int64), list[Tensor]()
    for last in range(F):
        value = torch.where(
            saved[:, : last + 1, last] < 0, -1, best[:, : last + 1] + saved[:, : last + 1, last]
        )
        top = value.flip(1).max(1)
        best[:, last + 1] = top.values
        begin.append(last - value.flip(1).argmax(1))
    starts, first = torch.stack(begin, 1), torch.full((videos, 1), F, device=alike.device)
    cut = torch.zeros(videos, F, dtype=torch.bool, device=alike.device)
    for _ in range(F):
        first = starts.gather(1, (first - 1).clamp(min=0))
        cut = cut.scatter(1, first, True)
    return cut


def still_in(alike: Tensor, starts: Tensor, runs: Tensor, real: Tensor) -> Tensor:
    """``[I, F, P]`` bool, the places alike all through their run, if that has more frames than one."""
    moved = real & ~alike & ~starts[..., None]
    frames = over_runs(torch.ones_like(runs), runs)
    calm = (over_runs(moved.float(), runs) == 0) & (frames > 1)[..., None]
    return calm.gather(1, runs.clamp(min=0)[..., None].expand_as(calm)) & real


def _blended(x: Tensor, joined: Tensor, beta: float) -> Tensor:
    """``x [G, P, D]`` with ``beta`` times itself and the rest times the mean of those that ``joined`` it, where there are any."""
    at = torch.arange(x.shape[1], device=x.device)
    others = joined.masked_fill(joined == at, -1)
    mean = ops.merge_tokens(x.contiguous(), others, x.shape[1])
    some = torch.zeros_like(joined).scatter_add(1, others.clamp(min=0), (others >= 0).long()) > 0
    return torch.where(some[..., None], beta * x + (1 - beta) * mean, x)


def _halved(x: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[B, K, D]`` of the tokens ``index [B, K]``, and into which token each was merged ``[B, N]``, -1 = into none.

    After m mergers a row holds itself times 2^-m, and the token that came i-th of m times 2^-(m - i + 1).
    """
    real = index >= 0
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    chosen = ops.gather_tokens([unit], index)[0]
    cosine = (unit @ chosen.mT).nan_to_num(-1.0).masked_fill(~real[:, None], -2.0)
    target = cosine.argmax(2)
    stays = marks(index, x.shape[1])
    goes = mask & ~stays
    slots = torch.arange(index.shape[1], device=x.device)
    taken = (target[..., None] == slots) & goes[..., None]
    upto = taken.cumsum(1, dtype=torch.int32)
    met = upto[:, -1]  # [B, K], how many each slot takes
    behind = (met[:, None] - upto).gather(2, target[..., None])[..., 0]
    own = torch.where(stays, stays.long().cumsum(1) - 1, 0)
    weight = torch.exp2(-torch.where(stays, met.gather(1, own), behind + 1).float())
    slot = torch.where(stays, own, target).masked_fill(~mask, -1)
    made = ops.merge_tokens(x.contiguous(), slot, index.shape[1], mode="sum", weights=weight)
    return made, index.gather(1, target).masked_fill(~goes, -1)
