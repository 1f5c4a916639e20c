"""FastV: keep the visual tokens that the previous layer's attention looks at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmprune.policies.base import Growth, Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import BEFORE, check_keep, check_layer, check_word


@dataclass(frozen=True)
class FastV(PruningPolicy):
    """Keeps the visual tokens with the most attention in layer ``layer - 1``, averaged over heads.

    The softmax spans the whole row, so text counts in it too. The paper's text averages the attention received
    from all tokens; its released code reads the last prompt row only. That is the default here.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones; at least 1.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        rows: ``"last"`` (released code) or ``"mean"`` over all prompt rows (paper text).
        spend: "prompt": the best tokens of all images of a prompt stay; "image": every image keeps its own budget; "crop":
            which is shared out over its crops (tiles, small view, frames).
    """

    summary = "most attended tokens of the previous layer"
    paper = "An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024), arXiv 2403.06764"
    formula = "s_j = mean_h A[K-1][h, last, j]  (rows='last')\nkeep the k highest s_j"
    presets = {
        192: "layer=2,keep=166",
        128: "layer=2,keep=98",
        64: "layer=2,keep=30",
        640: "layer=2,keep=490",
        320: "layer=2,keep=149",  # two full layers alone are a mean of 180
        0.333: "layer=2,keep=0.2816",
        0.222: "layer=2,keep=0.1621",
        0.111: "layer=2,keep=0.0426",
    }

    layer: int = 2
    keep: int | float = 0.5
    rows: Literal["last", "mean"] = "last"
    spend: Literal["prompt", "image", "crop"] = "prompt"

    def __post_init__(self) -> None:
        check_layer(self.layer, 1, BEFORE)
        check_keep(self.keep)
        check_word("rows", self.rows, "last", "mean")

    @property
    def growth(self) -> Growth:
        """All rows looking at all tokens are pairs."""
        return "n" if self.rows == "last" else "n^2"

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous", rows="last" if self.rows == "last" else "all")

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = ctx.given("attention")
        return ranked(ctx, self, seen.rating(seen.last if self.rows == "last" else seen.rows), static=True)
