"""TRIM: keep the tokens that are most like the text, and average the rest into one more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import check, require
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import gathered
from vlmprune.policies.checks import check_flag, check_keep, check_number
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.outlying import Picked, budget, in_raster_order, outliers, pick
from vlmprune.policies.parts.relevance import Relevance, relevance_of

TOWER = (-2,)
"""Any vision layer: the features come with it, its attention is not read."""


@dataclass(frozen=True)
class TRIM(PruningPolicy):
    """Keeps the tokens most relevant to the text as they are, and one more: the mean of all others.

    The mean is of the tower's features, which the projector then sees, and stands in the place of the last dropped token.
    How many stay is ``keep``, or what an image's outliers decide: with ``adaptive`` those whose share of ``softmax(scale
    r)`` over the image's tokens exceeds ``Q3 + 1.5 (Q3 - Q1)``, r their relevance.

    The paper's r is the product of CLIP's embeddings of patch and text, its sign turned, which undoes a peculiarity of
    CLIP's patch embeddings. LLaVA checkpoints carry neither CLIP's text tower nor its visual projection, so ``"text"`` is a
    reading: the mean cosine between a projected visual token and the input embeddings of the text after the last image, 100
    of which (CLIP's own factor) make a logit. A function gives those who have CLIP the paper's own, with ``scale=1.0``.

    Beside the released function on the same similarities (576 tokens, five ratios and outliers, 600 images) the same tokens
    stay and the mean is equal to the half precision it returns; of equal similarities ours are the first. Where we differ:
    a budget counts the mean, so that the released ratio of k of n tokens is ``keep`` ``int(k n) + 1``; each image of a
    batch counts its own outliers; where there is none (equal relevance, no text after the image) the best token stays
    beside the mean, the release keeps the mean alone; it can lose an outlier by rounding the ratio where n is not 576. NaN
    and infinite relevance is the least.

    Args:
        keep: tokens per image (int) or share (float), shared out evenly over its crops (tiles, small view, frames), the mean
            included (there is none where one token stays); newline tokens go. 0.21 is what the paper's images keep on
            average. With ``adaptive`` the most that may stay: 1.0 leaves it to the outliers.
        adaptive: whether an image's outliers decide how many of its tokens stay (the paper's own setting).
        relevance: ``"text"``, or a function of the TokenContext (which then has ``hidden`` and ``embeds``) that returns
            ``[B, N]``, higher = more relevant.
        scale: what relevance is multiplied with before the softmax, above 0; it matters with ``adaptive`` alone.
        positions: ``"keep"``, or ``"pack"`` (released code: in raster order, the mean last, at 0, 1, 2, ...).

    Raises:
        InputError: a setting is out of range; in ``select``, the function returns another shape.
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
        """The projected rows, the text's embeddings, and the tower's features."""
        return Needs(hidden=True, embeds=True, vision=TOWER)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        hidden = crops.split(ctx.given("hidden"))
        features = ctx.given("features")
        project = ctx.given("project")
        relevance = require(relevance_of(ctx, self.relevance), "relevance", "one that is not 'none'")
        scores, quota = crops.split(relevance), budget(ctx, self, crops)
        places, rows, into = [], [], []
        for kind in crops.kinds(quota):
            own, n = crops.take(hidden, kind), kind.crop.rows * kind.crop.columns
            picked = pick(self._turns(crops.take(scores, kind)), kind.kept, n if self.adaptive else None)
            made = picked.of(own)
            if picked.rest is not None:
                rest = project(mean_of_rest(picked, crops.take(features, kind))).to(own.dtype)
                made = torch.cat([made, rest], 1)
            places.append((kind, picked.places()))
            rows.append((kind, made))
            into.append((kind, merged_into_rest(picked)))
        both = crops.together(places), crops.together(rows)
        choice = gathered(ctx, crops, quota, both[0], self.positions, both[1], crops.together(into))
        return in_raster_order(choice, self.fixed_count)

    def _turns(self, score: Tensor) -> Tensor:
        """When each token's turn to be kept is, ``[i, n]`` int64: by relevance, from n on those that are not wanted."""
        score = score.masked_fill(~score.isfinite(), float("-inf"))
        _, rank = outliers(score)
        if not self.adaptive:
            return rank
        outlier, _ = outliers((self.scale * score).softmax(1))
        return torch.where(outlier | (rank == 0), rank, score.shape[1] + rank)


def mean_of_rest(picked: Picked, features: Tensor) -> Tensor:
    """``[i, 1, Dv]`` float32, the mean of the features ``[i, n, Dv]`` of what goes."""
    rest = torch.where(picked.stays, -1, 0)
    return ops.merge_tokens(
        features.float().contiguous(), rest, 1
    )  # a tower's rows may lie across one another


def merged_into_rest(picked: Picked) -> Tensor:
    """Into which place every token was merged, ``[i, n]`` int64: what goes into that of the rest; -1 = into none."""
    if picked.rest is None:
        return torch.full(picked.stays.shape, -1, dtype=torch.int64, device=picked.stays.device)
    into = torch.where(picked.stays, -1, picked.rest)
    return into.scatter(1, picked.rest, -1)
