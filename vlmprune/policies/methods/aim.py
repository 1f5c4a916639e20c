"""AIM: merge tokens that are alike before the language model, then drop a few at every layer by PageRank on attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlmprune.policies.base import Needs, Positions, Ranking, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import ranked, vision_of
from vlmprune.policies.checks import check_number, check_whole, check_word
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.decay import LinearDecay
from vlmprune.policies.parts.folding import Rounds, fold_crops
from vlmprune.policies.parts.page_rank import page_rank
from vlmprune.policies.parts.tower_keys import joined_keys


@dataclass(frozen=True)
class AIM(LinearDecay):
    """Merges every crop to ``keep`` tokens, then lets their number fall in a straight line over ``stages`` layers.

    Before the language model rounds of bipartite matching halve the tokens (the last round takes less): the even tokens most
    like their nearest odd one merge into it, as plain means. At each later stage a token is worth its PageRank in the previous
    layer, of all prompt rows, text included: softmax of logits / ``temperature`` in every head, ``rounds`` steps from even
    shares without damping, and the root of the mean square over heads. That takes whole rows: ``4 B (H / Hkv) S^2`` bytes for S
    rows, twice while the softmax runs.

    The released code masks, so that nothing is saved and dropped tokens are rows of the first step; ours are gone (on random
    attention, alike in all layers, 99 % of what stays after the second stage is the same, 92 % after the seventh). It ends with
    no visual token, ours with one of a sample that had any. Its counts are ``int(share n)`` of the n merged tokens, ours follow
    from what enters each stage, off by two at most. In a round that is no full half (of an odd number none is) it puts the even
    tokens that stay first, by falling likeness, where we keep raster order, which changes later rounds; of 576 and 196 tokens
    its settings have one such round, the last. Beside the authors' functions on the same float32 tensors (576 to 252 and 72,
    196 to 49 tokens) merged rows are equal to 1e-6, PageRank of 46 rows to 1e-5 of its size. Half-precision rows they compare
    in half precision, we in float32: near ties then fall otherwise.

    Args:
        keep: tokens per image (int) or share (float) after merging, shared out evenly over its crops; newline tokens go.
            Released: 0.25 of a video's frame in LLaVA-OneVision, 252 or 72 of 576 in LLaVA-1.5.
        features: what is compared and merged: ``"projected"`` rows (LLaVA-OneVision), or (LLaVA-1.5) the tower's features
            by the ``"keys"`` of a layer, all heads side by side, before the projector.
        layer: first decoder layer that sees fewer: one behind the first whose attention is read. Released: 14 of 32, for
            Qwen2's 28 layers 15.
        stages: over how many layers their number falls.
        last: which share of the merged tokens the last of them leaves; 0.0 (released) leaves one token.
        temperature: of the softmax, above 0.
        rounds: steps of PageRank, at least 1.
        vision_layer: vision-tower layer of the ``"keys"``.
        positions: of what merging leaves: ``"keep"``, a merged token having its odd one's, or ``"pack"`` (released code).
    """

    summary = "tokens alike merged before the LM, then a linear decay by PageRank on attention"
    paper = "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning (ICCV 2025), arXiv 2412.03248"
    formula = (
        "stage 1: rounds in every crop while m > k, m = tokens left: min(m - k, ⌊m / 2⌋) merge,\n"
        "those of highest max_j cos(x_i, x_j), i at places 0, 2, …, j at 1, 3, …  (features='projected')\n"
        "x_j ← plain mean of x_j and the x_i that merge into it\n"
        "stage a = 1 … stages:  P_h = causal softmax of z[K-1][h] / temperature, all rows and keys\n"
        "p_h = even shares of all rows · P_h^rounds;  s_j = √(mean_h p_h[j]²)\n"
        "keep the round(n f_a / f_{a-1}) highest s_j, at least 1,  f_a = 1 - a / stages  (last=0.0)"
    )
    presets = {
        **each("keep={},positions=pack", of={192: 350, 128: 233, 64: 116, 640: 1169, 320: 584, 160: 292}),
        **each("keep={},layer=15", of={0.333: 0.504, 0.222: 0.3355, 0.111: 0.1675}),
    }
    growth = "n^2"  # all pairs, before the model and in every layer that drops

    keep: int | float = 0.25
    features: Literal["projected", "keys"] = "projected"
    layer: int = 14
    stages: int = 8
    last: float = 0.0
    temperature: float = 0.1
    rounds: int = 5
    vision_layer: int = -1
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("features", self.features, "projected", "keys")
        check_number("temperature", self.temperature, above=0)
        check_whole("rounds", self.rounds, 1)

    def needs(self, layer: int) -> Needs:
        """To merge, the rows and perhaps a vision layer's keys; to drop, all rows of the layer before."""
        if layer:
            return Needs(attention="previous", rows="all")
        return Needs(hidden=True, vision=(self.vision_layer,) if self.features == "keys" else ())

    def first(self, ctx: TokenContext) -> Tensor | Reduction:
        crops, keys = crops_of(ctx), None
        if not crops.tokens:
            return ctx.ordinals
        if self.features == "keys":
            keys = joined_keys(vision_of(ctx, self.vision_layer, crops))
        return fold_crops(ctx, self, crops, Rounds(), self.positions, keys)

    def rank(self, ctx: TokenContext) -> Ranking:
        return ranked(ctx, self, page_rank(ctx.given("attention"), self.temperature, self.rounds))
