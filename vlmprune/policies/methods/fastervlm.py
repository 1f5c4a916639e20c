"""FasterVLM: keep the patches that the vision tower's CLS token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import ranked, vision_of
from vlmprune.policies.checks import check_keep
from vlmprune.policies.crops import crops_of


@dataclass(frozen=True)
class FasterVLM(PruningPolicy):
    """Keeps the patches with the most CLS attention, head mean, in every image; drops the rest before the language model.

    A tower without CLS is scored by the mean attention a patch receives from all patches (not in the paper).

    Args:
        keep: tokens per image (int; published budgets 192, 128, 64) or share (float; the paper's 1 - reduction ratio).
        vision_layer: vision-tower layer whose attention is read; -2 is the one whose output LLaVA projects.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
        spend: "crop": an image's budget is shared out evenly over its crops (released code: 128, 64 or 32 for each of
            LLaVA-NeXT's, and no newline token); "image": every image keeps its own; "prompt": the best patches of all images
            of a prompt stay.
    """

    summary = "patches most attended by the vision tower's CLS"
    paper = "[CLS] Attention is All You Need for Training-Free Visual Token Pruning, arXiv 2412.01818v1"
    formula = "s_j = mean_h V[vision_layer][h, CLS, j]\nin every crop keep the k highest s_j  (spend='crop')"
    presets = each("keep={}", counts=",positions=pack")
    growth = "n"  # of a tower with CLS; without, every patch looks at every other: n^2

    keep: int | float = 64
    vision_layer: int = -2
    positions: Positions = "keep"
    spend: Literal["prompt", "image", "crop"] = "crop"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    layers = (0,)  # before the language model

    def needs(self, layer: int) -> Needs:
        return Needs(vision=(self.vision_layer,))

    def rank(self, ctx: TokenContext) -> Ranking:
        crops = crops_of(ctx)
        if not crops.tokens:
            return Ranking(ctx.mask.float(), ctx.counts)
        seen = vision_of(ctx, self.vision_layer, crops)
        one_each = crops.equal and len(crops.tokens) == crops.batch
        # patches are tokens where a sample is one crop
        plain = one_each and seen.cells is None
        rating = seen.rating() if plain else crops.spread(seen.received(), fill=-1)
        return ranked(ctx, self, rating, self.positions)
