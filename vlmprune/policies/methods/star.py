"""STAR: visual self-attention thins the patches before the language model, the text's attention thins them mid-way."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlmprune.policies.base import Needs, Ranking, TokenContext
from vlmprune.policies.by_image import ranked, vision_of
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.raters import rated
from vlmprune.policies.parts.two_stages import TwoStages


@dataclass(frozen=True)
class STAR(TwoStages):
    """Keeps the patches with the most attention from all patches of their crop, later the ones that the text attends to most.

    A reading: no code is released, and we know the paper by its abstract and by reviews that repeat its formulas. Stage 1,
    there: ``A = softmax(H_v H_v^T / sqrt(d))`` over the visual tokens, ``r_i = mean_j A_ij``, the best ``(1 - R)`` stay.
    Stage 2, at decoder layer K: ``C = softmax(H_v H_q^T / sqrt(d))``, the same mean over the words and the answer's tokens.
    Taken to the letter both means are over what the softmax makes a sum of 1, the same for all tokens. Here they are
    those of what a token receives: the tower's own attention among patches, without CLS, mean over all rows and heads; and
    the previous decoder layer's attention of the text rows after the last image, softmax over the whole row, mean over rows
    and heads. An answer does not exist yet when the prompt runs, so it has no part. A sample without text after its image
    keeps tokens spread evenly in stage 2.

    Unknown, and so ours: which vision layer, both shares, the decoder layer ("intermediate"), and every preset.

    Args:
        keep: tokens per image (int) or share (float) that stage 1 keeps, shared out evenly over its crops.
        then: tokens per image (int) or share of the entering ones (float) that stage 2 keeps.
        layer: decoder layer of stage 2, which the layer before it chooses for; at least 1.
        vision_layer: vision-tower layer whose attention is read.
    """

    summary = "patches most attended by all others, then the text's attention mid-way"
    paper = (
        "STAR: Stage-Wise Attention-Guided Token Reduction for Efficient Large Vision-Language Models Inference, "
        "arXiv 2505.12359"
    )
    formula = (
        "stage 1, in every crop: s_j = mean_h mean_i V[vision_layer][h, i, j] among the patches, without CLS\n"
        "keep the k highest s_j\n"
        "stage 2: s_j = mean_t mean_h A[K-1][h, t, j]\n"
        "keep the k(then) highest s_j"
    )
    checked = "reading"
    presets = {
        192: "keep=288,then=96",
        128: "keep=192,then=64",
        64: "keep=96,then=32",
        640: "keep=960,then=320",
        320: "keep=480,then=160",
        160: "keep=240,then=80",
        0.333: "keep=0.5,then=0.333,layer=14",
        0.222: "keep=0.333,then=0.333,layer=14",
        0.111: "keep=0.167,then=0.333,layer=14",
    }
    growth = "n^2"  # every patch looks at every other

    keep: int | float = 0.5
    then: int | float = 0.333
    layer: int = 16
    vision_layer: int = -2
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        """Stage 1: a vision layer. Stage 2: query and key of the layer before it."""
        return Needs(attention="previous", rows="text") if layer else Needs(vision=(self.vision_layer,))

    def rank(self, ctx: TokenContext) -> Ranking:
        if ctx.layer:
            return ranked(ctx, self, rated(ctx.given("attention").rating(), ctx))
        crops = crops_of(ctx)
        if not crops.tokens:
            return Ranking(ctx.mask.float(), ctx.counts)
        seen = vision_of(ctx, self.vision_layer, crops)
        if seen.cls:  # among patches only: CLS neither pays nor receives
            seen = replace(seen, query=seen.query[:, :, 1:], key=seen.key[:, :, 1:], cls=False)
        return ranked(ctx, self, crops.spread(seen.received(), fill=-1))
