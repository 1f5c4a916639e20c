"""DivPrune: keep the visual tokens that are farthest from each other, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.errors import require
from vlmprune.policies.base import Needs, PruningPolicy, Reduction, TokenContext, check_keep, keep_count
from vlmprune.policies.vision import Positions, check_positions, choose_greedily, outcome


@dataclass(frozen=True)
class DivPrune(PruningPolicy):
    """Keeps tokens by greedy max-min cosine distance between projected features, before the language model.

    First the token whose nearest neighbour is farthest, then each time the one whose nearest kept token is farthest.
    All images of a sample are chosen from together, as released for the crops of LLaVA-NeXT. The released code may
    pick a token again where features are equal and so keep fewer; here a kept token is never picked again.

    Args:
        keep: share of a sample's tokens (float, rounded to the nearest count as released: 0.098 of 576 is 56) or tokens
            per image (int; 192, 128, 64 in later papers' tables).
        positions: ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...) or ``"keep"`` their own.

    Raises:
        ValueError: a setting is out of range.
    """

    summary: ClassVar[str] = "tokens most unlike each other (greedy max-min distance)"
    paper: ClassVar[str] = (
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (CVPR 2025), arXiv 2503.02175"
    )
    presets: ClassVar[Mapping[int, str]] = {192: "keep=192", 128: "keep=128", 64: "keep=64"}
    checked: ClassVar[str] = "formula"

    keep: int | float = 0.098
    positions: Positions = "pack"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positions(self.positions)

    @property
    def layers(self) -> tuple[int, ...]:
        """Before the language model."""
        return (0,)

    def needs(self, layer: int) -> Needs:
        """The projected features."""
        return Needs(hidden=True)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        """The most diverse tokens of each sample."""
        hidden = require(ctx.hidden, "ctx.hidden", "projected features (declare Needs(hidden=True))")
        kept = [self._count(n, images) for n, images in zip(ctx.counts, ctx.image_counts(), strict=True)]
        return outcome(choose_greedily(hidden, kept, "maxmin", ctx.mask), self.positions)

    def _count(self, tokens: int, images: float) -> int:
        if isinstance(self.keep, int):
            return keep_count(self.keep, tokens, images)
        return min(tokens, max(1, round(self.keep * tokens)))
