"""V2Drop: keep the visual tokens that a decoder layer changes most. No attention is computed, and no text is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.checks import check_keep, check_layers
from vlmprune.policies.choose import quotas
from vlmprune.policies.counts import keep_count


@dataclass(frozen=True)
class V2Drop(PruningPolicy):
    """Keeps at each stage the tokens whose hidden states the layer before has moved farthest, in L2 norm.

    Tokens that a layer leaves as they are ("lazy" ones) matter little to the answer, the paper finds; and how far a token
    moves does not favour the end of the prompt, as attention of its last row does. The distance is between what enters the
    stage's layer and what entered the one before, of the same tokens: a stage that has dropped or merged some there has gone
    ahead of both.

    Defaults are those of the released code for LLaVA-1.5-7B: a half at layers 3 and 17, one token at 22 (it takes none of 144,
    but at least one). That is a mean of 203 visual tokens over 32 layers; presets fit the first two shares to a budget.

    Args:
        layers: the stages, ascending; at least 1.
        keep: for each stage the share (float) of the visual tokens that enter it, or visual tokens per image (int).
    """

    summary = "tokens that the layer before has changed most, without attention"
    paper = (
        "Variation-aware Vision Token Dropping for Faster Large Vision-Language Models (CVPR 2026), arXiv 2509.01552; "
        "github.com/xuyang-liu16/V2Drop at 219e03e"
    )
    formula = (
        "s_j = ‖x_j - y_j‖₂,  y_j = what entered layer K-1 in the place of x_j\n"
        "at every stage K keep the k highest s_j"
    )
    presets = {192: "keep=0.468/0.468/1", 128: "keep=0.267/0.267/1", 64: "keep=0.0379/0.0379/1"}
    growth = "n"

    layers: tuple[int, ...] = (3, 17, 22)
    keep: tuple[int | float, ...] = (0.5, 0.5, 1)

    def __post_init__(self) -> None:
        check_layers(self.layers, 1, " (a token's way through the layer before is its score)")
        right = isinstance(self.keep, tuple) and len(self.keep) == len(self.layers)
        check(right, "keep", f"{len(self.layers)} shares or counts, one per layer", repr(self.keep))
        for entry in self.keep:
            check_keep(entry)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return keep_count(self.keep[self.layers.index(layer)], tokens, images)

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, earlier=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        now = ctx.given("hidden")
        before = ctx.given("earlier")
        return Ranking(
            torch.linalg.vector_norm(now.float() - before.float(), dim=2), tuple(quotas(ctx, self))
        )
