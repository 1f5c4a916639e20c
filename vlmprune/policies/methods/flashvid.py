"""FlashVID: attention and diversity choose in every frame, the rest grows into trees through time and clusters in space."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch

from vlmprune.policies.base import Needs, Positions, Reduction, TokenContext
from vlmprune.policies.by_image import quota_of, vision_of
from vlmprune.policies.checks import check_flag, check_number, check_share, check_whole, check_word
from vlmprune.policies.groups import Groups
from vlmprune.policies.parts.frames import Frames, Videos, frame_means, run_numbers, toward_runs
from vlmprune.policies.parts.scenes import Merged, settled
from vlmprune.policies.parts.segments import unlike_frames
from vlmprune.policies.parts.trees import clustered_trees
from vlmprune.policies.parts.turns import farthest
from vlmprune.policies.parts.two_stages import MergesFirst


@dataclass(frozen=True)
class FlashVID(MergesFirst):
    """For videos. Stage 1 keeps the telling tokens of every frame and merges all others, stage 2 is FastV's.

    The video is cut where mean rows of two frames have a cosine below ``cut``, and where it is least until there are
    ``segments``. ``alpha`` of a frame's budget, rounded up, goes to tokens chosen one after another, each the one whose nearest
    chosen one is farthest, as ``w_j (1 - cos)``, w the attention it receives in the tower times, with ``events``, its product
    with the segment's mean row. Every other token is linked to the most alike one of these in the frame before, if their cosine
    is above ``tau`` (higher where too few trees would be left). A tree becomes one row at its root; what is left of a frame is
    clustered around density peaks (7 neighbours, at most as many as clusters), so that a segment keeps its budget, into means.
    An image is a video of one frame; one that is cut up, of its small view and tiles.

    A reading in what a tree becomes, its mean. Not as released: a frame's budget is its even share (there each frame's and its
    clusters are rounded up); a segment of one frame does not cluster chosen tokens too; none is chosen twice (there with
    ``events`` where a product is negative); ties of density go to the lower place, not by noise; newlines go.

    Args:
        keep: tokens per image or video (int) or share (float) of stage 1: 1.25 times the authors' mean of layers, 0.1 to 0.25.
        then: tokens per image or video (int) or share of the entering ones (float, rounded up) that stage 2 keeps.
        layer: decoder layer of stage 2, at least 1.
        alpha: share of a frame's budget that is chosen, in [0, 1].
        events: whether the product with the segment's mean counts: released for LLaVA-OneVision and LLaVA-Video, not Qwen-VL.
        tau: cosine above which tokens of neighbouring frames are linked.
        cut: cosine of frames below which a segment ends.
        segments: how many there are at least; released 8, for Qwen-VL 4.
        divide: a tree's sum by its ``"tokens"`` (paper), or by 1 + its root's ``"links"`` (released; rows grow with a tree).
        vision_layer: vision-tower layer whose attention is read; -1 is the one whose output LLaVA-OneVision's projector gets.
        positions: after stage 1: ``"keep"``, a merged token having its centre's, or ``"pack"`` (released for LLaVA).
    """

    summary = "attention and diversity a frame, trees through time, clusters, then FastV"
    paper = (
        "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging "
        "(ICLR 2026), arXiv 2602.08024"
    )
    formula = (
        "stage 1: w_j = mean_h V[vision_layer][h, CLS, j] · (x_j · mean x of its segment)  (events=True)\n"
        "keep ⌈alpha k⌉ of every frame, one by one, of highest min_i w_j (1 - cos(x_i, x_j)) over the kept i\n"
        "each other j is linked to the i of the frame before of highest cos(x_i, x_j), if that is > tau\n"
        "trees of links become means at their roots  (divide='tokens')\n"
        "of the roots of each segment density peaks in every frame fill its k; others join the nearest: means\n"
        "stage 2: keep the k(then) highest mean_h A[K-1][h, last, j]"
    )
    checked = "reading"  # what a tree becomes: the paper's mean, not the released quotient
    for_video = True
    growth = "n^2"  # all pairs of a frame and of two neighbours

    keep: int | float = 0.3125
    then: int | float = 0.3
    layer: int = 20
    alpha: float = 0.7
    events: bool = True
    tau: float = 0.8
    cut: float = 0.9
    segments: int = 8
    divide: Literal["tokens", "links"] = "tokens"
    vision_layer: int = -1
    positions: Positions = "keep"
    spend = "crop"
    round_up = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha)
        check_flag("events", self.events)
        check_number("tau", self.tau)
        check_number("cut", self.cut)
        check_whole("segments", self.segments, 1)
        check_word("divide", self.divide, "tokens", "links")

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous") if layer else Needs(hidden=True, vision=(self.vision_layer,))

    def first(self, ctx: TokenContext, crops: Groups) -> Reduction:
        hidden, kept = ctx.given("hidden"), quota_of(ctx, self, crops).kept
        firsts = tuple(min(k, ceil(self.alpha * k - 1e-9)) for k in kept)
        seen = vision_of(ctx, self.vision_layer, crops).received()

        def merge(videos: Videos) -> Merged:
            x, real, weight = videos.split(hidden), videos.real(ctx.device), videos.take(seen)
            runs = run_numbers(unlike_frames(frame_means(x, real), self.cut, self.segments))
            weight = weight * toward_runs(x, real, runs) if self.events else weight
            chosen = farthest(x, weight, real, [firsts[g] for g in videos.numbers])
            left = videos.counts(kept, ctx.device) - videos.counts(firsts, ctx.device)
            stays, rows, into = clustered_trees(x, real & ~chosen, runs, left, self.tau, self.divide)
            return Merged(chosen | stays, torch.where(chosen[..., None], x.float(), rows), into)

        return settled(ctx, self, Frames(crops), merge)
