"""DivPrune: keep the visual tokens that are farthest from each other, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import spent
from vlmprune.policies.checks import check_keep
from vlmprune.policies.choose import choose_greedily


@dataclass(frozen=True)
class DivPrune(PruningPolicy):
    """Keeps tokens by greedy max-min cosine distance between projected features, before the language model.

    First the token whose nearest neighbour is farthest, then each time the one whose nearest kept token is farthest.
    All images of a prompt are chosen from together, as released for the crops of LLaVA-NeXT. The released code may
    pick a token again where features are equal and so keep fewer; here a kept token is never picked again.

    Args:
        keep: share of a sample's tokens (float, rounded to the nearest count as released: 0.098 of 576 is 56) or tokens
            per image (int; 192, 128, 64 in later papers' tables).
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
        spend: "prompt": the best tokens of all images of a prompt stay; "image": every image keeps its own budget; "crop":
            which is shared out evenly over its crops (tiles, small view, frames).
    """

    summary = "tokens most unlike each other (greedy max-min distance)"
    paper = "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (CVPR 2025), arXiv 2503.02175"
    formula = (
        "d_ij = 1 - cos(x_i, x_j)\n"
        "keep the j of highest min_i d_ij over all i ≠ j\n"
        "then again and again the j of highest min_i d_ij over the kept i, until round(keep · n) are kept"
    )
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^2"  # cosines of all pairs

    keep: int | float = 0.098
    positions: Positions = "keep"
    spend: Literal["prompt", "image", "crop"] = "prompt"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    layers = (0,)  # before the language model

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        hidden = ctx.given("hidden")
        return spent(ctx, self, partial(choose_greedily, "maxmin"), hidden, positions=self.positions)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """A share is rounded to the nearest count."""
        if isinstance(self.keep, int):
            return super().kept(tokens, images, layer)
        budgets = images if self.spend != "prompt" and tokens else 1
        return min(tokens, round(budgets * max(1, round(self.keep * tokens / budgets))))
