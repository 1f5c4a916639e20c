"""VScan: global and local patches before the language model, the rest merged into them; text attention in the middle."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import (
    Crop,
    Grid,
    Needs,
    Positions,
    PruningPolicy,
    Ranking,
    Reduction,
    TokenContext,
)
from vlmprune.policies.by_image import gathered, nearest, quota_of, ranked, rows_at, vision_of
from vlmprune.policies.checks import check_keep, check_layer, check_share, check_whole, share_of
from vlmprune.policies.choose import others, rank_within
from vlmprune.policies.counts import keep_count
from vlmprune.policies.crops import crops_of


@dataclass(frozen=True)
class VScan(PruningPolicy):
    """Keeps T patches of every image, then at one decoder layer the ones that the last prompt row attends to.

    Stage 1: ``int(T * local_ratio)`` patches are local: shared out evenly over the windows, in each window those with the
    most CLS attention in a shallow vision layer. The others of the T have the most CLS attention in a deep one. Every
    dropped row is merged into the kept row it is most cosine-similar to: the mean over all of them and the kept one, of
    projected features, as released.
    Stage 2: attention of the last prompt row, from the layer's own projections, softmax over the whole row, head mean.

    What the windows cannot share out evenly goes to the global patches, so exactly T are kept; the released code then
    keeps fewer (never at the published budgets). Windows cut off by the image's edge take part with what they have; the
    released code leaves them out (there are none in a 24 x 24 grid).

    Args:
        keep: T, tokens per image (int) or share (float), shared out evenly over its crops. LLaVA-1.5 at 64 tokens on average:
            96, then 32. 128 and 192 follow from the same two ratios: 192 and 64, 288 and 96.
        then: tokens per image (int) or share of the entering ones (float) that stage 2 keeps.
        layer: decoder layer of stage 2; at least 1.
        local_ratio: share of T chosen within windows, in [0, 1].
        window: rows and columns of a window.
        shallow_layer: vision-tower layer (first = 0) whose CLS attention ranks within windows.
        vision_layer: vision-tower layer whose CLS attention ranks the global patches.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: positions 0, 1, 2, ... after each stage).
    """

    summary = "global and windowed CLS attention with merging, then text attention mid-way"
    paper = (
        "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models (TMLR 2026), "
        "arXiv 2505.22654"
    )
    formula = (
        "stage 1, in every crop: m = ⌊⌊local_ratio · k⌋ / the number of its windows⌋\n"
        "of every window keep the m highest mean_h V[shallow_layer][h, CLS, j]\n"
        "of the others keep the highest mean_h V[vision_layer][h, CLS, j], until k are kept\n"
        "every dropped j joins the kept i of highest cos(x_i, x_j):  x_i ← mean of x_i and those x_j\n"
        "stage 2: s_j = mean_h A[K][h, last, j], of what enters layer K\n"
        "keep the k(then) highest s_j"
    )
    presets = {
        192: "keep=288,then=96,positions=pack",
        128: "keep=192,then=64,positions=pack",
        64: "keep=96,then=32,positions=pack",
        640: "keep=960,then=320,positions=pack",
        320: "keep=480,then=160,positions=pack",
        160: "keep=240,then=80,positions=pack",
        0.333: "keep=0.5,then=0.333,layer=14",
        0.222: "keep=0.333,then=0.333,layer=14",
        0.111: "keep=0.167,then=0.333,layer=14",  # the authors'; the two above follow from the same ratio
    }
    growth = "n^2"  # every dropped token is compared with every kept one

    keep: int | float = 96
    then: int | float = 32
    layer: int = 16
    local_ratio: float = 0.5
    window: int = 6
    shallow_layer: int = 5
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_keep(self.then, "then")
        check_layer(self.layer, 1, " (stage 1 is at layer 0)")
        check_share("local_ratio", self.local_ratio)
        check_whole("window", self.window, 1)
        check_whole("shallow_layer", self.shallow_layer)
        check_whole("vision_layer", self.vision_layer)

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, self.layer)

    def needs(self, layer: int) -> Needs:
        """Stage 1: two vision layers and the rows to merge. Stage 2: the layer's own query and key."""
        if layer == 0:
            return Needs(hidden=True, vision=tuple(sorted({self.shallow_layer, self.vision_layer})))
        return Needs(attention="own")

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        return self._scan(ctx) if ctx.layer == 0 else super().select(ctx)

    def ranks(self, layer: int) -> bool:
        """Stage 2; stage 1 merges."""
        return super().ranks(layer) and layer != 0

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = ctx.given("attention")
        return ranked(ctx, self, seen.rating(seen.last), self.positions, static=True)

    def at(self, share: float) -> Self:
        return replace(self, keep=share_of(share), then=share_of(share))

    def spends(self, layer: int) -> str:
        return "crop" if layer == 0 else "prompt"

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return keep_count(self.keep if layer == 0 else self.then, tokens, images, self.spends(layer))

    def _scan(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        hidden = crops.split(ctx.given("hidden"))
        quota = quota_of(ctx, self, crops)
        layers = (self.shallow_layer, self.vision_layer)
        scores = [vision_of(ctx, layer, crops).received() for layer in layers]
        picked, rows, into = [], [], []
        for kind in crops.kinds(quota):
            shallow, deep = (crops.take(x, kind) for x in scores)
            local, count = self._local(shallow, kind.crop, int(kind.kept * self.local_ratio))
            code = local.to(torch.int8)
            chosen = ops.select_topk(deep, kind.kept - count, code=code)[0][:, : kind.kept]
            picked.append((kind, chosen))
            made, own = merge_dropped(crops.take(hidden, kind), chosen)
            rows.append((kind, made))
            into.append((kind, own))
        made, own = crops.together(rows), crops.together(into)
        return gathered(ctx, crops, quota, crops.together(picked), self.positions, made, own)

    def _local(self, scores: Tensor, crop: Crop, share: int) -> tuple[Tensor, int]:
        """Marks ``[i, P]`` of each window's best patches, ``share`` divided by the windows, and how many a crop has."""
        windows = windows_of((crop.rows, crop.columns), self.window)
        patches = Counter(windows)
        each = share // len(patches)
        layout = whole_numbers(tuple(windows), scores.device).expand_as(scores)
        return rank_within(scores, layout) < each, sum(min(each, most) for most in patches.values())


def windows_of(grid: Grid, window: int) -> list[int]:
    """Number of the window that each patch of a grid lies in, in raster order; edge windows may be smaller."""
    across = -(-grid[1] // window)
    return [r // window * across + c // window for r in range(grid[0]) for c in range(grid[1])]


def merge_dropped(hidden: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[I, k, D]`` of the picked tokens ``[I, k]``, each the mean of itself and the dropped ones nearest to it.

    And into which place every token was merged, ``[I, P]``, -1 = it was picked.
    """
    P, k = hidden.shape[1], picked.shape[1]
    if k in (0, P):  # nothing to merge into, or nothing to merge
        return hidden[:, :k], torch.full(hidden.shape[:2], -1, dtype=torch.int64, device=hidden.device)
    dropped = others(picked, P)
    own = torch.arange(k, device=picked.device).expand_as(picked)
    assigned = picked.new_zeros(picked.shape[0], P).scatter(1, picked, own)
    assigned = assigned.scatter(1, dropped, nearest(rows_at(hidden, dropped), rows_at(hidden, picked)))
    into = picked.gather(1, assigned).scatter(1, picked, -1)
    return ops.merge_tokens(hidden, assigned, k, mode="mean"), into
