"""FlashVID: attention and diversity choose in every frame, the rest grows into trees through time and clusters in space."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, Reduction, TokenContext
from vlmprune.policies.by_image import quota_of, ranked, vision_of
from vlmprune.policies.checks import (
    check_flag,
    check_keep,
    check_layer,
    check_number,
    check_share,
    check_whole,
    check_word,
    share_of,
)
from vlmprune.policies.choose import FLOOR, falling_places
from vlmprune.policies.counts import keep_count
from vlmprune.policies.parts.frames import Frames, frame_means, frames_of, over_runs, run_numbers
from vlmprune.policies.parts.peaks import density_peaks
from vlmprune.policies.parts.scenes import settled
from vlmprune.policies.parts.trees import linked, roots, shares_of_runs


@dataclass(frozen=True)
class FlashVID(PruningPolicy):
    """For videos. Stage 1 keeps the telling tokens of every frame and merges all others, stage 2 is FastV's.

    The video is cut where mean rows of two frames have a cosine below ``cut``, and where it is least until there are ``segments``.
    Every frame's budget is shared: ``alpha`` of it, rounded up, go to tokens chosen one after another, each the one whose
    nearest chosen token is farthest, as ``w_j (1 - cos)``, w the attention it receives in the tower times, with ``events``, its
    product with the segment's mean row. Every other one is linked to the most alike other one of the frame before, wherever
    in it, if their cosine is above ``tau`` (higher where too few trees would be left). A tree of links becomes one row at
    its root. What is left is clustered in each frame around density peaks (7 neighbours, at most as many as clusters), so
    that a segment keeps its budget; clusters become means. Stage 2 keeps the tokens that the last row attends to most.

    An image is a video of one frame. One that is cut up is one of several, its small view and tiles.

    Not as released: a frame's budget is its even share of the video's (there every frame's is rounded up, and so are its
    clusters: up to one more a frame each); a segment of one frame does not cluster the tokens chosen before once more; a token
    is not chosen twice (there with ``events`` where the product is negative); ties of density go to the lower place (there
    noise decides); a newline token goes. The released code divides a tree's sum by one more than its root's own links, not
    by its tokens, so that rows grow with the length of a tree: ``divide="links"``.

    Args:
        keep: tokens per image or video (int) or share (float) of stage 1. The authors' is the retention that they mean over all
            layers, 0.1 to 0.25, times 1.25.
        then: tokens per image or video (int) or share of the entering ones (float) that stage 2 keeps.
        layer: decoder layer of stage 2, at least 1.
        alpha: share of a frame's budget that is chosen, in [0, 1].
        events: whether the product with the segment's mean counts: released for LLaVA-OneVision and LLaVA-Video; without for Qwen-VL.
        tau: cosine above which tokens of neighbouring frames are linked.
        cut: cosine of frames below which a segment ends.
        segments: how many there are at least; released 8, for Qwen-VL 4.
        divide: a tree's sum by its ``"tokens"``, its mean (the paper), or by ``"links"`` (released code).
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

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_keep(self.then, "then")
        check_layer(self.layer, 1, " (stage 1 is at layer 0)")
        check_share("alpha", self.alpha)
        check_flag("events", self.events)
        check_number("tau", self.tau)
        check_number("cut", self.cut)
        check_whole("segments", self.segments, 1)
        check_word("divide", self.divide, "tokens", "links")
        check_whole("vision_layer", self.vision_layer)

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, self.layer)

    def needs(self, layer: int) -> Needs:
        """Stage 1: a vision layer and the rows. Stage 2: query and key of the layer before it."""
        return Needs(attention="previous") if layer else Needs(hidden=True, vision=(self.vision_layer,))

    def ranks(self, layer: int) -> bool:
        """Stage 2; stage 1 merges."""
        return super().ranks(layer) and layer > 0

    def at(self, share: float) -> Self:
        return replace(self, keep=share_of(share), then=share_of(share))

    def spends(self, layer: int) -> str:
        return "prompt" if layer else "crop"

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """A share is rounded up at stage 2."""
        if layer and isinstance(self.then, float):
            return min(tokens, max(1, ceil(self.then * tokens - 1e-6)))
        return keep_count(self.then if layer else self.keep, tokens, images, self.spends(layer))

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = ctx.given("attention")
        return ranked(ctx, self, seen.rating(seen.last), static=True)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        return super().select(ctx) if ctx.layer else self._merged(ctx)

    def _merged(self, ctx: TokenContext) -> Tensor | Reduction:
        frames = frames_of(ctx)
        if not frames.groups.crops:
            return ctx.ordinals
        hidden = ctx.given("hidden")
        x, real = frames.split(hidden), frames.real(ctx.device)
        kept = quota_of(ctx, self, frames.groups).kept
        firsts = tuple(min(k, ceil(self.alpha * k - 1e-9)) for k in kept)
        left = frames.lay(whole_numbers(tuple(k - f for k, f in zip(kept, firsts, strict=True)), ctx.device))
        means = frame_means(x, real)
        runs = run_numbers(self._ends(means, frames, ctx), frames.there(ctx.device))
        chosen = self._chosen(ctx, frames, x, runs, means, firsts)
        free = real & ~chosen
        parent, link = linked(x, free, runs, left, self.tau)
        root = roots(parent, link)
        rows = self._grown(x, parent, link, root)
        heads = free & ~link
        wanted = shares_of_runs(heads.sum(2), left, runs).flatten()
        flat = rows.flatten(0, 1).contiguous()
        joined = density_peaks(flat, heads.flatten(0, 1), wanted, wanted.clamp(max=7), 7)
        made = ops.merge_tokens(flat, joined, x.shape[2]).view(x.shape)
        joined, places = joined.view(real.shape), torch.arange(x.shape[2], device=ctx.device)
        at = joined + torch.arange(x.shape[1], device=ctx.device)[:, None] * len(places)
        into = torch.where(joined < 0, -1, at).flatten(1).gather(1, root).view(real.shape)
        rows = torch.where(chosen[..., None], x.float(), made)
        return settled(ctx, self, frames, chosen | (joined == places), rows, into)

    def _ends(self, means: Tensor, frames: Frames, ctx: TokenContext) -> Tensor:
        """``[I, F]`` bool, where a segment begins: behind the frames least like the next."""
        there = frames.there(ctx.device)
        unit = normalize(means, dim=-1)
        cosine = (unit[:, 1:] * unit[:, :-1]).sum(-1)
        pairs = there[:, 1:]
        cuts = (cosine < self.cut) & pairs
        missing = (self.segments - 1 - cuts.sum(1, keepdim=True)).clamp(min=0)
        spare = pairs & ~cuts
        cuts = cuts | (spare & (falling_places(-cosine, spare) < missing))
        return torch.cat([torch.ones_like(there[:, :1]), cuts], 1)

    def _chosen(
        self,
        ctx: TokenContext,
        frames: Frames,
        x: Tensor,
        runs: Tensor,
        means: Tensor,
        firsts: tuple[int, ...],
    ) -> Tensor:
        """``[I, F, P]`` bool, the tokens of every frame that attention and diversity keep."""
        weight = frames.lay(vision_of(ctx, self.vision_layer, frames.groups).received())
        if self.events:
            size = over_runs(frames.there(ctx.device).float(), runs).clamp(min=1)
            event = over_runs(means, runs) / size[..., None]
            event = event.gather(1, runs.clamp(min=0)[..., None].expand_as(event))
            weight = weight * (x.float() @ event[..., None])[..., 0]
        real = frames.flat(frames.real(ctx.device))
        return frames.lay(weighted_maxmin(frames.flat(x), frames.flat(weight), real, firsts))

    def _grown(self, x: Tensor, parent: Tensor, link: Tensor, root: Tensor) -> Tensor:
        """``[I, F, P, D]`` float32, every tree's row at its root."""
        rows, tokens = x.float().flatten(1, 2), root.shape[1]
        if self.divide == "tokens":
            return ops.merge_tokens(rows, root, tokens).view(x.shape)
        total = ops.merge_tokens(rows, root, tokens, mode="sum")
        links = torch.zeros_like(root).scatter_add(1, parent.flatten(1), link.flatten(1).long())
        return (total / (1 + links)[..., None]).view(x.shape)


def weighted_maxmin(x: Tensor, weights: Tensor, real: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Marks ``[G, P]`` of ``counts[g]`` tokens of each group, chosen one after another: each the one of largest
    ``min_i w_j (1 - cos(x_i, x_j))`` over the chosen i; the first over all i, but for the least. Ties go to the lower place.

    Args:
        x: ``[G, P, D]``.
        weights: ``[G, P]``; NaN and infinities count as 0.
        real: ``[G, P]`` bool, False = padding.
    """
    G, P, _ = x.shape
    unit = normalize(x.float().nan_to_num(0.0, 0.0, 0.0), dim=-1)
    far = (1 - unit @ unit.mT) * weights.float().nan_to_num(0.0, 0.0, 0.0)[:, None]
    far = far.masked_fill(~real[..., None], float("inf"))
    nearest = far.topk(min(2, P), dim=1, largest=False).values[:, -1].nan_to_num(FLOOR)
    open_, order = real, list[Tensor]()
    for step in range(max(counts, default=0)):
        best = nearest.masked_fill(~open_, float("-inf")).argmax(1)
        order.append(best)
        row = far.gather(1, best[:, None, None].expand(G, 1, P))[:, 0]
        nearest = row if step == 0 else torch.minimum(nearest, row)
        open_ = open_.scatter(1, best[:, None], False)
    steps = torch.arange(len(order), device=x.device)
    taken = steps < whole_numbers(counts, x.device)[:, None]
    marks = torch.zeros(G, P + 1, dtype=torch.bool, device=x.device)
    places = torch.where(taken, torch.stack(order, 1), P) if order else steps.expand(G, 0)
    return marks.scatter(1, places, True)[:, :P]
