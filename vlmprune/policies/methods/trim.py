"""TRIM: keep the tokens that are most like the text, and average the rest into one more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.errors import check, require
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.checks import check_flag, check_keep, check_number
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Kind
from vlmprune.policies.parts.outlying import Picked, outliers, pick, with_rest
from vlmprune.policies.parts.relevance import Relevance, relevance_of


@dataclass(frozen=True)
class TRIM(PruningPolicy):
    """Keeps the tokens most relevant to the text as they are, and one more: the mean of all others.

    The mean is of the tower's features, which the projector then sees, and stands in the place of the last dropped token.
    Relevance is a reading: the mean cosine between a projected visual token and the input embeddings of the text after the
    last image. The paper's is the product of CLIP's embeddings of patch and text, its sign turned, which undoes a peculiarity
    of CLIP's patch embeddings; LLaVA checkpoints carry neither CLIP's text tower nor its visual projection.

    The released function keeps the same tokens by the same relevance, and the same mean to the half precision it returns (576
    tokens, five ratios and outliers, 600 images); of equal relevance ours are the first. Where we differ: a budget counts the
    mean, so the released ratio of k of n tokens is ``keep`` ``int(k n) + 1``; each image of a batch counts its own outliers;
    where there is none (equal relevance, no text after the image) the best token stays beside the mean, which the release
    keeps alone; and the release can lose an outlier by rounding the ratio where n is not 576.

    Args:
        keep: tokens per image (int) or share (float; the paper's images keep 0.21 on average), shared out evenly over its
            crops (tiles, small view, frames), the mean included (there is none where one token stays); newline tokens go.
            With ``adaptive`` the most that may stay: 1.0 leaves it to the outliers.
        adaptive: whether an image's outliers decide how many of its tokens stay (the paper's own setting): those whose share
            of ``softmax(scale r)`` over the image's tokens exceeds ``Q3 + 1.5 (Q3 - Q1)``, r their relevance.
        relevance: ``"text"``, or a function of the TokenContext (which then has ``hidden`` and ``embeds``), the paper's own
            for those who have CLIP, that returns ``[B, N]`` (else InputError): higher = more relevant, NaN or infinite = least.
        scale: of relevance in this softmax, above 0: 100, CLIP's own, makes logits of cosines; 1.0 is for the paper's own.
        positions: ``"keep"``, or ``"pack"`` (released code: in raster order, the mean last, at 0, 1, 2, ...).
    """

    summary = "tokens most relevant to the text, the mean of the rest as one more"
    paper = (
        "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs (COLING 2025), "
        "arXiv 2409.10994"
    )
    formula = (
        "s_j = mean_t cos(x_j, e_t)  (relevance='text')\n"
        "in every crop keep the k - 1 highest s_j  (adaptive=False)\n"
        "of those that go the last i stays for all of them, with x_i ← project(mean_j v_j)"
    )
    checked = "reading"
    presets = each("keep={}", counts=",positions=pack")
    growth = "n"

    keep: int | float = 0.21
    adaptive: bool = False
    relevance: Relevance = "text"
    scale: float = 100.0
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_flag("adaptive", self.adaptive)
        known = self.relevance == "text" or callable(self.relevance)
        check(known, "relevance", "'text' or a function of the context", repr(self.relevance))
        check_number("scale", self.scale, above=0)

    layers = (0,)  # before the language model
    spend = "crop"

    @property
    def fixed_count(self) -> bool:
        return not self.adaptive

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, embeds=True, vision=(-2,))  # any layer: the tower's features come with it

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        hidden, features = crops.split(ctx.given("hidden")), ctx.given("features")
        project = ctx.given("project")
        scores = crops.split(require(relevance_of(ctx, self.relevance), "relevance", "'text' or a function"))

        def trimmed(kind: Kind) -> tuple[Picked, Tensor]:
            own, score = crops.take(hidden, kind), crops.take(scores, kind)
            picked = pick(self._turns(score), kind.kept, score.shape[1] if self.adaptive else None)
            rows = picked.of(own)
            if picked.rest is not None:
                mean = project(picked.mean_of_rest(crops.take(features, kind)))
                rows = torch.cat([rows, mean.to(own.dtype)], 1)
            return picked, rows

        return with_rest(ctx, self, crops, self.positions, trimmed, merged=True)

    def _turns(self, score: Tensor) -> Tensor:
        """When each token's turn to be kept is, ``[i, n]`` int64: by relevance, from n on those that are not wanted."""
        score = score.masked_fill(~score.isfinite(), float("-inf"))
        _, rank = outliers(score)
        if not self.adaptive:
            return rank
        outlier, _ = outliers((self.scale * score).softmax(1))
        return torch.where(outlier | (rank == 0), rank, score.shape[1] + rank)
