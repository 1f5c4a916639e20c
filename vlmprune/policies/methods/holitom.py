"""HoliTom: runs of frames chosen for how much of them stands still, that merged over time; then alike tokens merge mid-way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.policies.base import Needs, Positions, Reduction, TokenContext
from vlmprune.policies.by_image import quota_of, vision_of
from vlmprune.policies.checks import check_number, check_share, check_whole
from vlmprune.policies.choose import falling_places, select_scores
from vlmprune.policies.groups import Groups
from vlmprune.policies.parts.frames import Frames, Videos, cosine_at
from vlmprune.policies.parts.halving import halved
from vlmprune.policies.parts.peaks import NEAR, blended, density_peaks
from vlmprune.policies.parts.scenes import Merged, Scene, settled
from vlmprune.policies.parts.segments import best_cuts
from vlmprune.policies.parts.two_stages import MergesFirst


@dataclass(frozen=True)
class HoliTom(MergesFirst):
    """For videos. Stage 1 cuts each into runs of frames so that as much as possible can be merged over time; stage 2 merges.

    A place stands still in a run if its token is like the one before (cosine above ``tau``) in every frame of it; such tokens
    become their mean, at the first frame. The runs are those, of all ways to cut the video, that merge the most tokens (dynamic
    programming; of equal ones the last run is the shortest). All tokens that are left give the same share: of the moving tokens
    of a frame stay those with the most attention in the tower, the merged ones of a run are clustered around density peaks (7
    neighbours, at most as many as clusters), ``beta`` times the centre plus the rest times the mean of the others. Stage 2
    keeps the tokens that the last row attends to most; each other one, in order, goes halfway into the kept one of most similar
    hidden states: ``x <- (x + x_j) / 2``. An image is a video of one frame: no more than attention chooses then. One that is
    cut up is one of several, its small view and tiles; frames of other shape begin a run.

    Not as released: the share is rounded so that the total is exact (there up for the moving tokens of each frame, to the
    nearest for the merged ones of each run); where fewer tokens are distinct than shall stay, the first of those that stand
    still stay beside their mean and out of it (there fewer stay); rows stand in raster order (there a run's merged ones first);
    ties of density go to the lower place, not by noise; a newline token goes.

    Args:
        keep: tokens per image or video (int) or share (float) of stage 1. Released: 0.1 (with ``tau=0.65``), 0.15, 0.2, 0.25.
        then: tokens per image or video (int) or share of the entering ones (float) that stage 2 leaves; 1.0 = none is merged.
        layer: decoder layer of stage 2, at least 1; released 18 of 28.
        tau: cosine above which a token stands still.
        beta: weight of a cluster's centre, in [0, 1].
        longest: frames of a run, at most.
        vision_layer: vision-tower layer whose attention is read; -1 is the one whose output LLaVA-OneVision's projector gets.
        positions: after stage 1: ``"keep"``, a merged token having its first frame's or its centre's, or ``"pack"`` (released).
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
    spend = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau)
        check_share("beta", self.beta)
        check_whole("longest", self.longest, 1)

    def needs(self, layer: int) -> Needs:
        if layer:
            return Needs(hidden=True, attention="previous")
        return Needs(hidden=True, vision=(self.vision_layer,))

    def first(self, ctx: TokenContext, crops: Groups) -> Reduction:
        frames, hidden = Frames(crops), ctx.given("hidden")
        alike = cosine_at(hidden, frames.same_place(frames.before(), ctx.device)) > self.tau
        seen, kept = vision_of(ctx, self.vision_layer, crops).received(), quota_of(ctx, self, crops).kept

        def merge(videos: Videos) -> Merged:
            x, real = videos.split(hidden), videos.real(ctx.device)
            calm = videos.split(alike) & real
            scene = Scene.unchanging(best_cuts(calm, self.longest), calm, real)
            shares, more = scene.shared_out(videos.counts(kept, ctx.device).sum(1))
            means, (lead, moving) = scene.over_time(x, more), shares.unbind(2)
            best = scene.moving & (falling_places(videos.take(seen), scene.moving) < moving[..., None])
            joined = density_peaks(means, scene.lead, lead, lead.clamp(max=NEAR), NEAR)
            peaks = joined == torch.arange(x.shape[2], device=ctx.device)
            return Merged(best | peaks | more, blended(means, joined, self.beta), scene.into(joined, more))

        return settled(ctx, self, frames, merge)

    def second(self, ctx: TokenContext) -> Tensor | Reduction:
        seen, rows = ctx.given("attention"), ctx.given("hidden")
        index = select_scores(seen.received(seen.last), ctx, self)
        if index.shape[1] == ctx.mask.shape[1]:  # all of it stays
            return index
        made, merged = halved(rows, index, ctx.mask)
        return Reduction(index, made, merged=merged)
