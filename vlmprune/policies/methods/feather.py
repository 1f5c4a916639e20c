"""FEATHER: two stages of RoPE-free attention, the first joined by a coarse grid so that no region is lost early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmprune.policies.base import Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import BEFORE, check_keep, check_layers, check_whole, check_word
from vlmprune.policies.counts import keep_count, union_count
from vlmprune.policies.parts.lattice import grid_count, stride_code


@dataclass(frozen=True)
class Feather(PruningPolicy):
    """Keeps what the last prompt row attends to without RoPE, whose decay otherwise favours the image's bottom.

    Stage 1 keeps the best ``int(n * keep)`` tokens together with the stride grid of every image (a set union, so
    between ``int(n * keep)`` and that plus the grid); stage 2 the best ``int(n1 * keep**2)`` of those, without a grid.
    The score is softmax over the visual tokens alone, averaged over heads.

    Args:
        layers: the two stages, ascending, at least 1 each.
        keep: share of the visual tokens, a float in (0, 1]; the paper's 1 - R. The default cuts 64 % of the FLOPs, as
            published; 0.6 cuts 48 %, whose R the paper does not state (inferred).
        stride: rows and columns between two grid tokens.
        rounding: ``"exact"``, or ``"released"``: that of ``int(n * (1 - r))`` in floating point, with r = 1 - keep. That is one
            token less in 641 of 99 x 1001 cases (r in hundredths, n up to 1000): of 90 tokens 62, not 63, stay at r = 0.3.
    """

    summary = "RoPE-free attention with a coarse grid, then a harder cut"
    paper = "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration, arXiv 2412.13180"
    formula = (
        "p[h, j] = softmax_j(z[K-1][h, last, j]) over the visual tokens alone, z without RoPE\n"
        "s_j = mean_h p[h, j]\n"
        "stage 1: keep the k highest s_j ∪ the tokens [::stride, ::stride] of every grid\n"
        "stage 2: keep the k(keep²) highest s_j"
    )
    # a quarter of the layers is full: of less than that, budgets cannot be met
    presets = {192: "keep=0.22", 0.333: "layers=7/14,keep=0.217"}
    growth = "n"

    layers: tuple[int, int] = (8, 16)
    keep: float = 0.3
    stride: int = 3
    rounding: Literal["exact", "released"] = "exact"

    def __post_init__(self) -> None:
        check_layers(self.layers, 1, BEFORE, two=True)
        check_keep(self.keep, counts=False)
        check_whole("stride", self.stride, 1)
        check_word("rounding", self.rounding, "exact", "released")

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous")

    def rank(self, ctx: TokenContext) -> Ranking:
        """Top-k and grid at the first stage (their union: one host read for the width), top-k alone at the second."""
        seen = ctx.given("attention").chunk()
        rating = seen.rating(seen.last, normalize="columns", unrotated=True)
        if ctx.layer != self.layers[0]:
            return ranked(ctx, self, rating, static=True)
        grid, sizes = stride_code(ctx, self.stride)
        best = tuple(self._best(n, ctx.layer) for n in ctx.counts)
        return Ranking(rating, best, code=grid, extra=sizes, static=ctx.whole)

    fixed_count = False  # the first stage keeps a union

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Exact at the second stage; at the first what is expected of a union with the grid of whole, square images."""
        best = self._best(tokens, layer)
        if layer != self.layers[0]:
            return best
        return union_count(best, grid_count(tokens, images, self.stride), tokens)

    def _best(self, tokens: int, layer: int) -> int:
        """How many stay by their score."""
        exact = self.rounding == "exact"
        # digits of 1 - keep that a user who typed r did not mean
        keep = self.keep if exact else 1 - round(1 - self.keep, 12)
        share = keep if layer == self.layers[0] else keep * keep
        return keep_count(share, tokens) if exact else min(tokens, max(1, int(tokens * share)))
