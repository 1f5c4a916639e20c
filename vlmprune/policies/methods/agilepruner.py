"""AgilePruner: the patches most attended by CLS, each of which removes its likeness; the more, the richer the image is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import ranked, vision_of
from vlmprune.policies.checks import check_keep, check_number, is_number
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Groups
from vlmprune.policies.parts.spectrum import effective_rank
from vlmprune.policies.parts.turns import in_order, outlived, unit_rows

RISE = 0.01
"""By how much the threshold grows with every place in the order of attention, for an image of average rank."""


@dataclass(frozen=True)
class AgilePruner(PruningPolicy):
    """Goes through a crop's patches by falling CLS attention; one that is kept removes the later ones that are close to it.

    Close is a cosine distance below a threshold that grows with the patch's place in that order, and with how many directions
    the crop's features span: their effective rank (the exponential of the entropy of their singular values), against
    ``average``. So a simple image keeps what is attended most, and a rich one what differs.

    No code is published. Sources give the rule but neither the average effective rank (of LLaVA's training images) nor the cap
    of the threshold, nor what fills the budget once too few are left. ``average`` is the mean of the ranks that the paper's
    table of simple and complex images lists (49 to 109), ``cap`` is ours; the patches removed fill up by attention. Both
    cosine and rank are of the features before the projector.

    Args:
        keep: tokens per image (int; published budgets 128, 64, 32) or share (float), shared out evenly over its crops.
        average: effective rank of an average image, above 0; 85 is of the 576 patches of LLaVA-1.5.
        cap: largest threshold, a cosine distance in [0, 2]; 0 = attention alone.
        vision_layer: vision-tower layer whose attention is read.
        positions: ``"keep"`` their own, or ``"pack"``.
        spend: "crop": an image's budget is shared out evenly over its crops; "image": every image keeps its own; "prompt": the
            best patches of all images of a prompt stay. Patches remove those of their own crop.
    """

    summary = "patches attended by CLS, thinned by likeness as the image's effective rank says"
    paper = (
        "AgilePruner: An Empirical Study of Attention and Diversity for Adaptive Visual Token Pruning in Large "
        "Vision-Language Models (ICLR 2026), arXiv 2603.01236"
    )
    formula = (
        "o_j = place of j, from 1, in falling order of mean_h V[vision_layer][h, CLS, j]\n"
        "q_m = singular value m = 1, 2, … of all v_j of the crop, over their sum;  r = exp(-∑_m q_m log q_m)\n"
        "in this order, j goes if an i stays with 1 - cos(v_i, v_j) < min(cap, 0.01 · o_i · r / average)\n"
        "in every crop keep the k first that stay, if they are fewer also those that go  (spend='crop')"
    )
    presets = each("keep={}", counts=",positions=pack")
    checked = "reading"
    growth = "n^2"  # cosines of all pairs

    keep: int | float = 64
    average: float = 85.0
    cap: float = 0.4
    vision_layer: int = -2
    positions: Positions = "keep"
    spend: Literal["prompt", "image", "crop"] = "crop"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_number("average", self.average, above=0)
        check(is_number(self.cap) and 0 <= self.cap <= 2, "cap", "a number in [0, 2]", repr(self.cap))

    layers = (0,)  # before the language model

    def needs(self, layer: int) -> Needs:
        """Query and key of the vision layer; the features come with them."""
        return Needs(vision=(self.vision_layer,))

    def rank(self, ctx: TokenContext) -> Ranking:
        crops = crops_of(ctx)
        if not crops.tokens:
            return Ranking(ctx.mask.float(), ctx.counts)
        features = ctx.given("features")
        scores = vision_of(ctx, self.vision_layer, crops).received()
        return ranked(
            ctx, self, crops.spread(self._thinned(features, scores, crops), fill=-torch.inf), self.positions
        )

    def _thinned(self, features: Tensor, scores: Tensor, crops: Groups) -> Tensor:
        """Minus the place ``[I, T]`` of each patch in the order in which they stay."""
        real, P = crops.padding(scores.device), scores.shape[1]
        scores = scores.nan_to_num(0.0, 0.0, 0.0)
        if real is not None:
            scores, features = scores.masked_fill(~real, -1), features.masked_fill(~real[..., None], 0)
        order = scores.argsort(dim=1, descending=True, stable=True)
        unit, places = unit_rows(features), torch.arange(P, device=scores.device)
        rise = RISE / self.average * effective_rank(features)[:, None] * (places + 1)
        close = 1 - in_order(unit @ unit.mT, order) < rise.clamp(max=self.cap).float()[:, :, None]
        place = places + P * outlived(close)
        return torch.zeros_like(scores).scatter_(1, order, -place.float())
