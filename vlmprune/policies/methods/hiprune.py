"""HiPrune: objects by a middle vision layer, with the tokens around them, the rest by a deep one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import quota_of, ranked, vision_of
from vlmprune.policies.checks import check_keep, check_share, check_whole
from vlmprune.policies.choose import falling_places
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.received import received_from_all
from vlmprune.policies.parts.windows import with_neighbours

CROSS = 5
"""An anchor and the four tokens around it."""


@dataclass(frozen=True)
class HiPrune(PruningPolicy):
    """Keeps anchor tokens of the object layer, the tokens around them as buffer, and register tokens of a deep layer.

    All by the mean attention a token receives from all rows, CLS among them, and over heads. Anchors are a fifth of the share
    ``alpha`` of the budget, so that with their buffers (left, right, above and below) they are that share at most; registers
    fill it up.

    The released code adds to a token's number, without regard to the image's edges: left of a line's first token is the end
    of the line above, and above the first line is token 0. Here such a neighbour is none. At most a fifth of the budget are
    anchors, where rounding would have more than fit (the released code fails). Newline tokens go (released: all stay).

    Args:
        keep: tokens per image (int; published budgets 192, 128, 64) or share (float), shared out evenly over its crops: 640 for
            five of LLaVA-NeXT are the released code's 128 for each.
        alpha: share of the budget for anchors and buffers, in [0, 1].
        object_layer: vision-tower layer (first = 0) whose attention finds anchors: 8, the released 9 counted from 1, for CLIP,
            15 for Qwen2.5-VL.
        vision_layer: vision-tower layer whose attention finds registers: -2 for CLIP, -1 for Qwen2.5-VL.
        positions: ``"keep"`` their own (released code for Qwen2.5-VL), or ``"pack"`` (for LLaVA: at 0, 1, 2, ...).
    """

    summary = "anchors of a middle vision layer with their neighbours, registers of a deep one"
    paper = (
        "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models, "
        "arXiv 2508.00553"
    )
    formula = (
        "a_j = mean_h mean_i V[object_layer][h, i, j];  s_j = mean_h mean_i V[vision_layer][h, i, j],\n"
        "over all rows i, CLS among them\n"
        "in every crop the round(alpha · k / 5) highest a_j are anchors\n"
        "keep them and the tokens left of, right of, above and below each\n"
        "and of the others the highest s_j, until k are kept"
    )
    presets = each("keep={}", counts=",positions=pack") | {
        share: f"keep={share},object_layer=15,vision_layer=-1" for share in (0.333, 0.222, 0.111)
    }
    growth = "n^2"  # every patch looks at every other

    keep: int | float = 64
    alpha: float = 0.1
    object_layer: int = 8
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_share("alpha", self.alpha)
        check_whole("object_layer", self.object_layer)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        """Query and key of both vision layers."""
        return Needs(vision=tuple(sorted({self.object_layer, self.vision_layer})))

    def rank(self, ctx: TokenContext) -> Ranking:
        crops = crops_of(ctx)
        if not crops.tokens:
            return Ranking(ctx.mask.float(), ctx.counts)
        middle, deep = (
            received_from_all(vision_of(ctx, layer, crops))
            for layer in (self.object_layer, self.vision_layer)
        )
        quota = quota_of(ctx, self, crops)
        anchors = tuple(min(round(k * self.alpha / CROSS), k // CROSS) for k in quota.kept)
        real = crops.padding(ctx.device)
        there = torch.ones_like(middle, dtype=torch.bool) if real is None else real
        best = falling_places(middle, there) < whole_numbers(anchors, ctx.device)[:, None]
        scores = deep.masked_fill(with_neighbours(crops, best), float("inf"))
        return ranked(ctx, self, crops.spread(scores, fill=-1), self.positions)
