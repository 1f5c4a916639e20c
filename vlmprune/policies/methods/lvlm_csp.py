"""LVLM_CSP: a subset of the image in the early layers, all of it in a few middle ones, then what the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import check_keep, check_seed, check_whole, check_word, share_of
from vlmprune.policies.counts import keep_count
from vlmprune.policies.methods.random import drawn
from vlmprune.policies.parts.lattice import stride_scores
from vlmprune.policies.parts.received import attended


@dataclass(frozen=True)
class LVLMCSP(PruningPolicy):
    """Early layers see a part of an image (clustering), middle ones all (scattering), later ones the most attended (pruning).

    N_c of an image's N tokens stand for its clusters: by "uniform" those at ``i * floor(N / N_c)``, by "random" a draw, by
    "cls" those that CLS attends to most (head mean; without CLS the mean attention received). The others leave before layer 0.
    At layer ``scatter`` all are active again, taken literally: with their input embeddings, not what the clusters have become.

    A reading, of the abstract and of summaries: no code was found, nor which layers and how many tokens the authors took.
    Defaults and presets are ours; the defaults run 34 % of the tokens on average over 32 layers, near the published cut of
    65 %. The paper prunes by the attention of a [SEG] token, which other models' prompts do not have: here by that of the last
    prompt row, or of all text behind the image, in the last layer that sees every token, softmax over the whole row, head mean.
    Left out is "seg first", clusters in proportion to the objects that a segmenter finds.

    Args:
        cluster, then: N_c (``cluster``), and what stays from layer ``prune`` on (``then``): tokens per image (int) or shares (float).
        scatter, prune: first decoder layers that see all tokens again (``scatter``, at least 1) and the pruned ones (``prune``, later).
        by, vision_layer, seed: how clusters are chosen: by "uniform", "random" (draw ``seed``) or "cls" (in tower layer ``vision_layer``).
        rows: whose attention prunes: "last" or "text".
    """

    summary = "a subset in the early layers, all tokens in the middle, then the most attended"
    paper = (
        "LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning "
        "Segmentation, arXiv 2504.10854"
    )
    formula = (
        "layer 0: of every image keep 0, d, 2 d, …, (c - 1) d, c = k(cluster), d = ⌊n / c⌋  (by='uniform')\n"
        "layer scatter: all n are back, those set aside with the x_j they had at layer 0\n"
        "layer prune: s_j = mean_h A[prune-1][h, last, j]  (rows='last')\n"
        "keep the k(then) highest s_j"
    )
    checked = "reading"
    presets = {
        **each("cluster={0},then={0}", of={192: 137, 128: 64, 640: 320, 0.333: 0.2218, 0.222: 0.0923}),
        **each("prune=10,cluster={0},then={0}", of={320: 149, 0.111: 0.0426}),
        64: "prune=10,cluster=29,then=30",
        160: "prune=9,cluster=72,then=72",
    }
    growth = "n"

    cluster: int | float = 0.25
    then: int | float = 0.25
    scatter: int = 8
    prune: int = 12
    by: Literal["uniform", "random", "cls"] = "uniform"
    rows: Literal["last", "text"] = "last"
    vision_layer: int = -2
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.cluster, "cluster")
        check_keep(self.then, "then")
        check_whole("scatter", self.scatter, 1, " (clusters are chosen at layer 0)")
        check_whole("prune", self.prune)
        check(self.prune > self.scatter, "prune", f"a layer behind scatter={self.scatter}", self.prune)
        check_word("by", self.by, "uniform", "random", "cls")
        check_word("rows", self.rows, "last", "text")
        check_seed(self.seed)

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, self.scatter, self.prune)

    def needs(self, layer: int) -> Needs:
        if layer == 0:
            return Needs(vision=(self.vision_layer,) if self.by == "cls" else ())
        return Needs(restored=True) if layer == self.scatter else Needs(attention="previous", rows=self.rows)

    def rank(self, ctx: TokenContext) -> Ranking:
        if ctx.layer == self.scatter:
            return Ranking(ctx.mask.float(), ctx.counts)
        if ctx.layer == self.prune:
            seen = ctx.given("attention")
            return ranked(ctx, self, seen.rating(seen.last if self.rows == "last" else None), static=True)
        if self.by == "random":
            return ranked(ctx, self, drawn(self.seed, ctx.counts, ctx.device), static=True)
        if self.by == "uniform":
            counts = tuple(tuple(self.kept(n, 1, 0) for n in own) for own in ctx.images())
            return ranked(ctx, self, stride_scores(ctx.images(), counts, ctx.device), static=True)
        return ranked(ctx, self, attended(ctx, self.vision_layer))

    def spends(self, layer: int) -> str:
        return "image" if layer == 0 else "prompt"

    def kept(self, tokens: int, images: float, layer: int) -> int:
        if layer == self.scatter:
            return tokens
        return keep_count(self.cluster if layer == 0 else self.then, tokens, images, self.spends(layer))

    def at(self, share: float) -> Self:
        return replace(self, cluster=share_of(share), then=share_of(share))
