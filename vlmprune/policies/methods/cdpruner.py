"""CDPruner: keep visual tokens that are unlike each other and relevant to the text, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import spent
from vlmprune.policies.checks import check_keep
from vlmprune.policies.choose import choose_relevant
from vlmprune.policies.parts.lattice import lattice_scores
from vlmprune.policies.parts.relevance import Relevance, check_relevance, relevance_of, scaled

LEAST = 1e-6
"""Added to the least relevance in the released code, so that no token has none at all."""

ROUNDING = torch.finfo(torch.float32).eps
"""By how much the relevance of equal tokens may differ: a product of matrices may round its last rows otherwise."""


@dataclass(frozen=True)
class CDPruner(PruningPolicy):
    """Keeps the greedy MAP set of a DPP with the kernel ``rel_i cos_ij rel_j`` over each image's projected features.

    The paper's relevance is the negative mean similarity of CLIP's patch and text embeddings, which needs CLIP's text
    tower and visual projection. LLaVA checkpoints carry neither, so ``"text"`` is a reading: the mean cosine between a
    projected visual token and the input embeddings of the text after the last image. Its sign is positive, because the
    paper's minus undoes a peculiarity of CLIP's patch embeddings. A function gives those who have CLIP the paper's own.

    Relevance is scaled to 0..1 over the tokens of a sample; the released code scales over the whole batch, so there a
    neighbour changes the choice. If all tokens are equally relevant, only diversity counts; so it is with no text after
    the image. NaN and infinite tokens are unlike all others, NaN and infinite relevance is none.

    Where candidates tie, the more relevant one is taken, and of equally relevant ones the one next in an order that is spread
    evenly over the image. So it goes once the kept tokens span all others (as many as features have dims, or fewer: an image of
    one colour has one direction, a second token adds nothing): the rest are the most relevant ones, and evenly spread ones
    where all are equally relevant. The released code divides by zero there and may keep fewer.

    Args:
        keep: tokens per image (int; published budgets 192, 128, 64) or share of its tokens (float).
        relevance: ``"text"``, ``"none"`` (diversity alone), or a function of the TokenContext (which then has ``hidden`` and
            ``embeds``) that returns ``[B, N]``, higher = more relevant.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
        spend: "crop": an image's budget is shared out evenly over its crops, each chosen from by itself (released code: 128, 64
            or 32 for each of LLaVA-NeXT's, and no newline token); "image": every image is chosen from as one; "prompt": all
            images of a prompt are.

    Raises:
        ValueError: a setting is out of range; in ``select``, the function returns another shape.
    """

    summary = "tokens unlike each other and relevant to the text (DPP)"
    paper = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs (NeurIPS 2025), "
        "arXiv 2506.10967"
    )
    formula = (
        "c_j = mean_t cos(x_j, e_t);  r_j = (c_j - min c + 10⁻⁶) / (max c - min c)  (relevance='text')\n"
        "L_ij = r_i cos(x_i, x_j) r_j\n"
        "in every crop, k times: keep the j for which det L[kept ∪ j] is highest  (spend='crop')"
    )
    presets = each("keep={}", counts=",positions=pack")
    checked = "reading"
    growth = "n^3"  # every further choice looks at all earlier ones, for each token

    keep: int | float = 64
    relevance: Relevance = "text"
    positions: Positions = "keep"
    spend: Literal["prompt", "image", "crop"] = "crop"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_relevance(self.relevance)

    layers = (0,)  # before the language model

    def needs(self, layer: int) -> Needs:
        """The projected features, and the text's embeddings unless only diversity counts."""
        return Needs(hidden=True, embeds=self.relevance != "none")

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        hidden = ctx.given("hidden")
        found = relevance_of(ctx, self.relevance)
        if found is None:
            relevance = torch.ones_like(ctx.mask, dtype=torch.float32)
        else:
            relevance = scaled(found, ctx.mask, LEAST, ROUNDING)
        spread = lattice_scores(ctx, [0] * len(ctx.counts))
        return spent(ctx, self, choose_relevant, hidden, relevance, spread, positions=self.positions)
