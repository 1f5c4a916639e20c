"""LVLM_CSP: a subset of the image in the early layers, all of it in a few middle ones, then what the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from vlmprune.constants import remembered
from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import ranked, vision_of
from vlmprune.policies.checks import check_keep, check_seed, check_whole, check_word, share_of
from vlmprune.policies.counts import keep_count
from vlmprune.policies.crops import crops_of
from vlmprune.policies.methods.random import drawn


@dataclass(frozen=True)
class LVLMCSP(PruningPolicy):
    """Runs a subset of every image's tokens in the early layers (clustering), all in some middle layers (scattering), and from
    there on those with the most attention (pruning).

    N_c of an image's N tokens stand for its clusters: by "uniform" those at ``i * floor(N / N_c)``, by "random" a draw, by
    "cls" those with the most CLS attention (head mean; without a CLS token the mean attention received). The others are set
    aside before layer 0 and stand in their places again at layer ``scatter``.

    A reading, of the abstract and of summaries: no code was found, nor which layers and how many tokens the authors took.
    Defaults and presets are ours; the defaults run 34 % of the tokens on average over 32 layers, near the published cut of
    65 %. All tokens become active again, which is taken literally: each brings the input embedding with which it left, not
    what the clusters have become. The paper prunes by the attention of a [SEG] token, which other models' prompts do not
    have: here by that of the last prompt row, or of all text behind the image, in the last layer that sees every token,
    softmax over the whole row, head mean. Left out is "seg first", clusters in proportion to the objects that a segmenter
    finds.

    Args:
        cluster: N_c, tokens per image (int) or share (float).
        then: tokens per image (int) or share (float) from layer ``prune`` on.
        scatter: first decoder layer that sees all tokens again; at least 1.
        prune: first decoder layer that sees ``then``; behind ``scatter``.
        by: how clusters are chosen: "uniform", "random" or "cls".
        rows: whose attention prunes: "last" or "text".
        vision_layer: vision-tower layer whose attention "cls" reads.
        seed: which draw "random" is.

    Raises:
        InputError: a setting is out of range.
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
        192: "cluster=137,then=137",
        128: "cluster=64,then=64",
        64: "prune=10,cluster=29,then=30",
        640: "cluster=320,then=320",
        320: "prune=10,cluster=149,then=149",
        160: "prune=9,cluster=72,then=72",
        0.333: "cluster=0.2218,then=0.2218",
        0.222: "cluster=0.0923,then=0.0923",
        0.111: "prune=10,cluster=0.0426,then=0.0426",
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
        check_whole("vision_layer", self.vision_layer)
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
            rows = seen.last if self.rows == "last" else seen.rows
            return ranked(ctx, self, seen.rating(rows), static=True)
        if self.by == "random":
            return ranked(ctx, self, drawn(self.seed, ctx.counts, ctx.device), static=True)
        if self.by == "uniform":
            steps = tuple(tuple(n // self.kept(n, 1, 0) for n in own) for own in ctx.images())
            return ranked(ctx, self, strided(ctx.images(), steps, ctx.device), static=True)
        crops = crops_of(ctx)
        if not crops.tokens:
            return ranked(ctx, self, ctx.mask.float())
        attended = vision_of(ctx, self.vision_layer, crops).received()
        return ranked(ctx, self, crops.spread(attended, fill=-1))  # behind all of it what is of no crop

    def spends(self, layer: int) -> str:
        return "image" if layer == 0 else "prompt"

    def kept(self, tokens: int, images: float, layer: int) -> int:
        if layer == self.scatter:
            return tokens
        return keep_count(self.cluster if layer == 0 else self.then, tokens, images, self.spends(layer))

    def at(self, share: float) -> Self:
        return replace(self, cluster=share_of(share), then=share_of(share))


@remembered()
def strided(
    images: tuple[tuple[int, ...], ...], steps: tuple[tuple[int, ...], ...], device: torch.device
) -> Tensor:
    """float32 ``[B, N]``: 1 at every ``step``-th token of every image of every sample from its first one on, elsewhere 0.

    Of equal scores the first ones stay: of k of n tokens those at ``i * floor(n / k)``.
    """
    scores = torch.zeros(len(images), max(map(sum, images), default=0))
    for row, sizes, own in zip(scores, images, steps, strict=True):
        first = 0
        for n, step in zip(sizes, own, strict=True):
            row[first : first + n : step] = 1
            first += n
    return scores.to(device)
