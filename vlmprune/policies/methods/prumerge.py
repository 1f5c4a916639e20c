"""PruMerge and PruMerge+: keep the patches CLS attends to, add to each the ones most like it, and sum up the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import vision_of
from vlmprune.policies.checks import check_flag, check_keep, check_whole
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Kind
from vlmprune.policies.parts.outlying import Picked, pick, summed, turns, with_rest
from vlmprune.policies.parts.received import joined_attention
from vlmprune.policies.parts.tower_keys import joined_keys


@dataclass(frozen=True)
class PruMerge(PruningPolicy):
    """Keeps the patches with the most CLS attention, each with those most like it added, and one token for all the rest.

    Attention is that of one head made of all (``softmax(q k^T / sqrt(H D))``, as released). A kept patch gains its
    ``neighbours`` nearest others by the cosine of keys, kept or not, each times its CLS attention; the last token is the sum
    of the dropped ones, each times its attention. All of it is of the tower's features; the projector then sees the result.

    How many stay is ``keep``, or what an image's outliers decide: with ``adaptive`` those of an attention above ``Q3 + 1.5
    (Q3 - Q1)``. PruMerge+ (``plus``) adds evenly spaced patches: as many as those by attention, at ``(2 i + 1) n / 2 s`` for
    s of n (4, 12, 20, ... of the released 72 of 576), or with ``adaptive`` every ``floor(n / c / 3)``-th where c are outliers.

    Beside the released functions on the same float32 tensors (576 patches) rows are equal to 1e-6 of the largest in 160 of
    160 runs of PruMerge by ratio and by outliers, in 40 of 40 of PruMerge+ by ratio where no spaced patch is among the best,
    and in 73 of 80 by outliers, the others having one token more. Where we differ: a budget counts the token for the rest, so
    that the released ratio of 1/8 is ``keep=73`` of 576, and 145 with ``plus``. A spaced patch that is there already is kept
    once, not twice, and the next by attention takes its place; the last patch may be a spaced one (theirs end at 574: the
    token more). An image without outliers keeps the best patch (the release none, and PruMerge+ divides by zero), one of
    which a third or more are outliers is no error, and each image of a batch counts its own. Where all tokens stay they stay
    as they are. Without a CLS token the mean attention that a patch receives stands in.

    Args:
        keep: tokens per image (int) or share (float), shared out evenly over its crops (tiles, small view, frames), the token
            for the rest included (there is none where one token stays); newline tokens go. With ``adaptive`` the most that
            may stay: 1.0 leaves it to the outliers.
        plus: whether evenly spaced patches are added: PruMerge+.
        adaptive: whether an image's outliers decide how many of its tokens stay (released default; the paper's tables).
        neighbours: how many patches each kept one gains, at least 0.
        vision_layer: vision-tower layer whose attention and keys are read; the last one as released.
        positions: ``"keep"``, the rest in the place of the last dropped patch; or ``"pack"`` (released code: by falling
            attention, spaced ones in raster order, then the rest).
    """

    summary = "patches most attended by CLS, similar ones added to each, the rest summed up"
    paper = "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (ICCV 2025), arXiv 2403.15388"
    formula = (
        "y_j = u_j[vision_layer][h] of all h side by side, q = the query of CLS alike, d = its length\n"
        "s_j = softmax_j of q · y_j / √d, over CLS and all j\n"
        "in every crop keep the k - 1 highest s_j  (plus=False, adaptive=False)\n"
        "v_j ← v_j + ∑_i s_i v_i over the neighbours i ≠ j of highest cos(y_i, y_j), kept or not\n"
        "of those that go the last i stays for all of them, with v_i ← ∑_j s_j v_j\n"
        "x_j ← project(v_j)"
    )
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^2"  # every kept token is compared with every other

    keep: int | float = 0.125
    plus: bool = False
    adaptive: bool = False
    neighbours: int = 32
    vision_layer: int = -1
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_flag("plus", self.plus)
        check_flag("adaptive", self.adaptive)
        check_whole("neighbours", self.neighbours, 0)

    layers = (0,)  # before the language model
    spend = "crop"

    @property
    def fixed_count(self) -> bool:
        return not self.adaptive

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        hidden, features = crops.split(ctx.given("hidden")), ctx.given("features")
        project, seen = ctx.given("project"), vision_of(ctx, self.vision_layer, crops)
        attention = joined_attention(seen)
        keys = joined_keys(seen)

        def merged(kind: Kind) -> tuple[Picked, Tensor]:
            paid, own = crops.take(attention, kind), crops.take(hidden, kind)
            most = None if self.adaptive else kind.kept - (kind.kept > 1)
            turn = turns(paid, most, self.plus)
            picked = pick(turn, kind.kept, 2 * paid.shape[1] if self.adaptive else None)
            picked = picked.in_turn(turn) if self.positions == "pack" else picked
            if not self.adaptive and kind.kept == own.shape[1]:
                return picked, picked.of(own)
            new = summed(picked, paid, crops.take(features, kind), crops.take(keys, kind), self.neighbours)
            return picked, project(new).to(own.dtype)

        return with_rest(ctx, self, crops, self.positions, merged)
