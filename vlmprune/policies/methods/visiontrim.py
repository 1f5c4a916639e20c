"""VisionTrim: keep the patches that CLS and their surroundings make dominant, and merge others by the text into a few more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.errors import check
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import vision_of
from vlmprune.policies.checks import check_keep, check_share, check_whole, check_word
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Kind
from vlmprune.policies.parts.affinity import local_affinity, steadier
from vlmprune.policies.parts.centres import keep_and_merge
from vlmprune.policies.parts.received import received_from_others


@dataclass(frozen=True)
class VisionTrim(PruningPolicy):
    """Keeps dominant patches as they are, and merges those of the rest that the text speaks of into a few.

    Dominant are the patches of the highest ``a softmax(CLS attention) + (1 - a) softmax(local affinity)``, where the less a
    term varies over the image the more it counts: ``a = var(local) / (var(CLS) + var(local))``. The affinity of a patch is
    how like those around it are, in features and place. Of the others, those whose mean cosine with the text's tokens is
    highest are centres; each one that is left joins the centre of the highest ``sum_t cos(i, t) cos(t, centre)``, and a
    centre gains the mean of what joins it. That runs ``rounds`` times, centres compared as they have become. All of it is of
    the tower's features; the projector then sees the result.

    A reading, as the sources disagree and LLaVA checkpoints have no text tower. The paper's score is the one above; its code
    computes it and overwrites it with ``score="received"``: half the CLS attention and half the mean attention from all
    other patches, each over its norm. In its affinity a place outside the image counts as a patch like this one, which
    favours edges; the paper's mean is over the neighbours. Of the merging the paper writes softmaxes and weights; we follow
    the code, which has cosines and plain means. It compares in CLIP's embedding, by its text tower and visual projection;
    here projected rows and the input embeddings of the text after the last image stand in, as in CDPruner. With no text
    after the image, centres are the first of the others, and each is joined by those most like it. Beside the released
    functions on the same float32 tensors (36 to 576 patches) ``score="received"`` leaves the same rows in 112 of 112 images,
    the affinity is equal to 3e-7 once edges are counted alike, and the combined score that they overwrite shares 85 to 98 %
    of its patches with ours. The paper also prunes within the language model; of that its code has a sketch, commented out,
    without layer or budget: what is wanted there, ``Stages`` puts behind this.

    Args:
        keep: tokens per image (int) or share (float), shared out evenly over its crops (tiles, small view, frames), centres
            included; newline tokens go. Released: 64.
        text_ratio: share of them that are centres, in [0, 1], rounded down; one dominant patch stays at least. Released: 16 of 64.
        score: ``"local"`` (the paper's) or ``"received"`` (the released code's; 4 bytes for each two patches and each head).
        window: rows and columns of the places around a patch, an odd number, at least 1.
        rounds: how often what is left joins the centres, at least 1.
        vision_layer: vision-tower layer whose attention is read: the one whose output the projector gets.
        positions: ``"keep"``, a centre having its own; or ``"pack"`` (released code: dominant ones, then centres).
    """

    summary = "patches dominant by CLS and surroundings, others merged by the text into a few"
    paper = "VisionTrim: Unified Vision Token Compression for Training-Free MLLM Acceleration (ICLR 2026), arXiv 2601.22674"
    formula = (
        "g_j = softmax_j mean_h V[vision_layer][h, CLS, j];  p_j = softmax_j of -mean_i (d_ij² + b_ij² / 2),\n"
        "i around j, d_ij = |v_i - v_j| / std v, b_ij = the same of places  (window=3)\n"
        "s_j = a g_j + (1 - a) p_j, a = var p / (var g + var p);  r = ⌊text_ratio · k⌋  (score='local')\n"
        "in every crop keep the k - r highest s_j; of the others the r highest mean_t cos(x_j, e_t)\n"
        "rounds times: each i of the rest joins the one of these j of highest ∑_t cos(x_i, e_t) cos(e_t, x_j)\n"
        "v_j ← v_j + mean of the v_i that join j;  x_j ← project(v_j)"
    )
    checked = "reading"
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^2"  # every merged token is compared with every centre

    keep: int | float = 64
    text_ratio: float = 0.25
    score: Literal["local", "received"] = "local"
    window: int = 3
    rounds: int = 3
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_share("text_ratio", self.text_ratio)
        check_word("score", self.score, "local", "received")
        check_whole("window", self.window, 1)
        check(self.window % 2 == 1, "window", "an odd number", self.window)
        check_whole("rounds", self.rounds, 1)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        """The vision layer, projected rows, and the text's embeddings unless nothing is merged."""
        return Needs(hidden=True, embeds=self.text_ratio > 0, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        seen, features = vision_of(ctx, self.vision_layer, crops), ctx.given("features")
        paid = [seen.received()] + ([received_from_others(seen)] if self.score == "received" else [])

        def dominance(kind: Kind) -> Tensor:
            by_cls, *by_others = (crops.take(x, kind).double() for x in paid)
            if by_others:
                return normalize(by_cls, dim=1) + normalize(by_others[0], dim=1)
            grid = kind.crop.rows, kind.crop.columns
            near = local_affinity(crops.take(features, kind), grid, self.window)
            return steadier(by_cls.softmax(1), near.softmax(1))

        return keep_and_merge(ctx, self, crops, dominance, self.text_ratio, self.rounds, self.positions)
