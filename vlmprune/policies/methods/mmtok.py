"""MMTok: visual tokens that cover the text and all visual tokens at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import spent
from vlmprune.policies.checks import check_keep, check_number
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.relevance import text_directions
from vlmprune.policies.parts.turns import covering, taken_in_turn, unit_rows


@dataclass(frozen=True)
class MMTok(PruningPolicy):
    """Keeps, one after another, the token that adds most to the coverage of the text plus ``alpha`` times that of the image.

    Each text token spreads a weight of 1 over the image's tokens, by softmax of its cosines with their projected features;
    each visual token does the same with the features before the projector. A row is covered by the largest weight that a kept
    token has from it, and coverage is the mean over the rows.

    The text is all that stands behind the last image, its template's words included. The released code takes the question
    alone, without some fifty function words and the benchmarks' instruction sentences, and splits it at blanks. With no text
    there, only the image is covered. The released code for LLaVA-1.5 also keeps no patch of the bars that pad an image to a
    square; transformers' processor crops instead.

    Args:
        keep: tokens per image (int; published budgets 192, 128, 64) or share (float), shared out evenly over its crops, each
            chosen from by itself (``spend="crop"``, released code).
        alpha: weight of the image's coverage, at least 0.
        text_temperature: of the softmax of text over visual tokens, above 0 (released code: 0.02 for LLaVA, 0.01 for Qwen).
        vision_temperature: of that of visual tokens over each other, above 0.
        vision_layer: a layer of the vision tower; asked for as the features come with it, whichever it is.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
        spend: "crop": each crop keeps its share; "image": each image is chosen from as one; "prompt": so is each prompt.
    """

    summary = "tokens that cover the text and the image at once (greedy)"
    paper = "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs (ICLR 2026), arXiv 2508.18264"
    formula = (
        "p_tj = softmax_j(cos(x_j, e_t) / text_temperature)\n"
        "q_ij = softmax_j(cos(v_i, v_j) / vision_temperature);  b_t = 0, c_i = 0\n"
        "in every crop, k times: keep the j of highest  (spend='crop')\n"
        "mean_t max(0, p_tj - b_t) + alpha · mean_i max(0, q_ij - c_i)\n"
        "then for this j  b_t ← max(b_t, p_tj);  c_i ← max(c_i, q_ij)"
    )
    presets = each("keep={}", counts=",positions=pack")
    checked = "reading"
    growth = "n^3"  # every further choice looks at all pairs

    keep: int | float = 64
    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    vision_layer: int = -2
    positions: Positions = "keep"
    spend: Literal["prompt", "image", "crop"] = "crop"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_number("alpha", self.alpha, least=0)
        for name in ("text_temperature", "vision_temperature"):
            check_number(name, getattr(self, name), above=0)

    layers = (0,)  # before the language model

    def needs(self, layer: int) -> Needs:
        """Projected features, those before the projector, and the text's embeddings."""
        return Needs(hidden=True, embeds=True, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        hidden = ctx.given("hidden")
        features = ctx.given("features")
        words = text_directions(ctx).nan_to_num(0.0, 0.0, 0.0)
        alike = unit_rows(hidden) @ words.mT
        alike = alike.masked_fill(ctx.given("text")[:, None] < 0, float("-inf"))  # rows of no text
        by_sample = crops.spread(unit_rows(features)), alike
        return spent(ctx, self, self._taken, *by_sample, positions=self.positions)

    def _taken(self, kept: list[int], mask: Tensor | None, unit: Tensor, alike: Tensor) -> Tensor:
        """Places ``[G, K]`` by directions ``[G, P, D]`` and cosines with the text ``[G, P, T]``."""
        real = unit.new_ones(unit.shape[:2]) if mask is None else mask.float()
        if mask is not None:  # padding resembles no text
            alike = alike.masked_fill(~mask[..., None], float("-inf"))
        worded = (alike > float("-inf")).any(1)
        text = shares(alike.mT / self.text_temperature, mask) / worded.sum(1).clamp(min=1)[:, None, None]
        image = shares(unit @ unit.mT / self.vision_temperature, mask) * real[:, :, None]
        image = image * (self.alpha / real.sum(1).clamp(min=1))[:, None, None]
        return taken_in_turn(covering(torch.cat([text, image], 1)), kept, mask)


def shares(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the real ones of the tokens ``[G, R, P]``; zeros in a row that has no logits."""
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0)
