"""FOLDER: fold the patches of every image into fewer, by rounds of matching those that are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import vision_of
from vlmprune.policies.checks import check_keep, check_number, check_word
from vlmprune.policies.counts import keep_count
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.folding import Rounds, fold_crops
from vlmprune.policies.parts.tower_keys import mean_keys

ALPHA_UNIT = 100
"""What the authors' code for LLaVA-1.5 multiplies alpha with; that for BLIP has 30."""


@dataclass(frozen=True)
class Folder(PruningPolicy):
    """Halves the tokens of every crop by bipartite matching, round by round, until ``keep`` are left; the last round takes less.

    Every other token is a destination. The sources most like their nearest destination merge into it, by means in which a
    token that stands for m counts m times; what stays keeps its order. Two forms are released:

    ``"tower"``, the complete code, for LLaVA-1.5: keys of the last block but one, averaged over heads, are compared, and 100
    alpha times CLS's attention is taken off a source's likeness, so that what CLS looks at stays; merged are the tower's
    features, which the projector then sees. There the release folds between that block's attention and its MLP, here behind the block: the same
    tokens merge, but into a mean of MLP outputs, not the MLP's output of a mean. On random CLIP towers of 6 blocks whose MLP
    makes 3 % (37 %) of a row's norm, merged rows of 192 from 576 differ by 0.6 % (9 %), cosine 1.000 (0.996). The release
    also puts the sources that stay ahead of the destinations, where we keep raster order. Without a CLS token (not in the
    release) destinations are the odd tokens and the penalty is a mean row's.

    ``"projected"``, the authors' short form, which they recommend for comparisons: projected rows are compared and merged,
    and a row that stands for m is multiplied by 1 + log m (the release leaves that out where one round does and takes a
    third of the tokens or more). No vision attention is read.

    Beside the authors' functions on the same float32 tensors (576 tokens to 476 and fewer, 196 to 98 and 76) rows are equal to
    3e-6 in both forms, the MLP aside. Where two tokens are to become one they do; the release stops at two, in a tower at 40.

    Args:
        keep: tokens per image (int) or share (float), shared out evenly over its crops (tiles, small view, frames); newline
            tokens go. The authors keep 192 of 576 (their r = 16) and 144 (r = 18), and 0.5 of projected rows.
        place: ``"tower"`` or ``"projected"``.
        alpha: weight of CLS's attention, at least 0; for ``"tower"`` alone.
        vision_layer: vision-tower layer whose keys and attention are read, for ``"tower"`` alone: the one whose output the
            projector gets.
        positions: ``"keep"``, a merged token having its destination's, or ``"pack"`` (released code).
    """

    summary = "rounds that merge the patches most alike, those CLS looks at last"
    paper = (
        "FOLDER: Accelerating Multi-modal Large Language Models with Enhanced Performance (ICCV 2025), "
        "arXiv 2501.02430"
    )
    formula = (
        "rounds in every crop while m > k, m = tokens left: min(m - k, ⌊m / 2⌋) merge  (place='tower')\n"
        "y_j = mean_h u_j[vision_layer][h];  i at places 1, 3, …, j at 0, 2, … (with CLS)\n"
        "s_i = max_j cos(y_i, y_j) - 100 alpha mean_h V[vision_layer][h, CLS, i]\n"
        "the i of highest s_i merge into their nearest j\n"
        "y_j, v_j ← means weighted by how many tokens each is made of; V: plain means\n"
        "x_j ← project(v_j) where tokens have merged"
    )
    checked = "reading"
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^2"  # a round compares sources with destinations

    keep: int | float = 192
    place: Literal["tower", "projected"] = "tower"
    alpha: float = 5.0
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_word("place", self.place, "tower", "projected")
        check_number("alpha", self.alpha, least=0)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, vision=(self.vision_layer,) if self.place == "tower" else ())

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return keep_count(self.keep, tokens, images, "crop")

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        if self.place == "projected":
            rounds = Rounds(spare=1, weighted=True)
            return fold_crops(ctx, self, crops, rounds, self.positions, finish=_louder)
        seen = vision_of(ctx, self.vision_layer, crops)
        keys = mean_keys(seen)
        rounds = Rounds(first=1 - seen.cls, spare=1 - seen.cls, weighted=True)
        penalty = seen.received() * (self.alpha * ALPHA_UNIT)
        return fold_crops(ctx, self, crops, rounds, self.positions, keys, penalty)


def _louder(rows: Tensor, sizes: Tensor) -> Tensor:
    return rows * (1 + sizes.log())[..., None].to(rows.dtype)
