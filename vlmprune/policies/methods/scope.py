"""SCOPE: visual tokens that cover what no kept one covers yet, the salient ones first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import spent, vision_of
from vlmprune.policies.checks import check_keep, check_number
from vlmprune.policies.choose import choose_greedily
from vlmprune.policies.crops import crops_of


@dataclass(frozen=True)
class SCOPE(PruningPolicy):
    """Keeps, one after another, the token by which all tokens would be better covered, times its CLS attention.

    A token is covered as well as it resembles the kept token most like it: cosine of the vision features before the projector,
    at least 0. Saliency is the attention that CLS pays in ``vision_layer``; the released code adds it up over the heads where
    here it is their mean, which changes no choice. A tower without CLS is asked for its mean row.

    Args:
        keep: tokens per image (int; published budgets 192, 128, 64) or share (float), shared out evenly over its crops, each
            chosen from by itself (``spend="crop"``, released code).
        alpha: power of the saliency, at least 0; 0 = coverage alone (the released scripts and the paper: 1).
        vision_layer: vision-tower layer whose attention is read.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
        spend: "crop": each crop keeps its share; "image": every image is chosen from as one; "prompt": all images of a prompt
            are.
    """

    summary = "tokens that cover the image best, weighted by CLS attention (greedy)"
    paper = "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs (NeurIPS 2025), arXiv 2510.24214"
    formula = (
        "s_j = mean_h V[vision_layer][h, CLS, j];  c_i = 0\n"
        "in every crop, k times: keep the j of highest  (spend='crop')\n"
        "s_j^alpha · ∑_i max(0, cos(v_i, v_j) - c_i)\n"
        "then for this j  c_i ← max(c_i, cos(v_i, v_j))"
    )
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^3"  # every further choice looks at all pairs

    keep: int | float = 64
    alpha: float = 1.0
    vision_layer: int = -2
    positions: Positions = "keep"
    spend: Literal["prompt", "image", "crop"] = "crop"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_number("alpha", self.alpha, least=0)

    layers = (0,)  # before the language model

    def needs(self, layer: int) -> Needs:
        """Query and key of the vision layer; the features come with them."""
        return Needs(vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        features = ctx.given("features")
        saliency = vision_of(ctx, self.vision_layer, crops).received() ** self.alpha
        by_sample = crops.spread(features.contiguous()), crops.spread(saliency)
        return spent(ctx, self, partial(choose_greedily, "coverage"), *by_sample, positions=self.positions)
