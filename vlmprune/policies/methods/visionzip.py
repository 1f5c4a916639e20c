"""VisionZip: keep the patches CLS attends to, and fold all others into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import quota_of, vision_of
from vlmprune.policies.checks import share_of
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Kind
from vlmprune.policies.parts.merging import kept_and_made, merged_targets
from vlmprune.policies.parts.tower_keys import mean_keys
from vlmprune.policies.parts.two_budgets import TwoBudgets


@dataclass(frozen=True)
class VisionZip(PruningPolicy):
    """Keeps the dominant patches of every image and merges the rest into contextual ones.

    Dominant are the patches with the most CLS attention (its sum over heads ranks as its mean). Of the rest, in raster order,
    every ``step``-th is a target, ``step`` their number divided by ``contextual`` and rounded down; each other one goes to
    the target whose key, averaged over heads, is most cosine-similar. A contextual token is its target plus the mean of what
    went to it, in the tower's features; the projector then sees the result, as in the released code.

    Both budgets of an image are shared out evenly over its crops (tiles, small view, frames), each reduced by itself, as
    released for LLaVA-NeXT; newline tokens go. Where a token is a mix of patches, so are its features and key.

    Args:
        dominant, contextual: tokens of an image kept as they are (``dominant``) and merged (``contextual``): two numbers or shares.
        tokens: instead of the two, or in agreement with them, a published budget: 192 (162 + 30), 128 (108 + 20), 64 (54 + 10)
            or 32 (27 + 5). Without it ``dominant`` is 54, and ``contextual`` 10, where they are not given.
        count_cls: the authors count CLS among the dominant tokens and feed its row to the language model, which has no place
            for it here. True keeps the patches they keep: one fewer than ``dominant``, a number.
        vision_layer: vision-tower layer whose attention and keys are read.
        positions: ``"keep"``: in raster order at their own positions, contextual ones at their target's; or ``"pack"``
            (released code: dominant tokens, then contextual ones, at 0, 1, 2, ...).
    """

    summary = "patches most attended by CLS, the rest merged into contextual tokens"
    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models (CVPR 2025), arXiv 2412.04467"
    formula = (
        "s_j = mean_h V[vision_layer][h, CLS, j];  y_j = mean_h u_j[vision_layer][h]\n"
        "in every crop keep the k(dominant) highest s_j\n"
        "of the m = n - k(dominant) others every ⌊m / c⌋-th is target i, c = k(contextual) of them\n"
        "every other j goes to the i of highest cos(y_i, y_j)\n"
        "keep every i with x_i ← project(v_i + mean of the v_j that went to it)"
    )
    presets = {
        **each("tokens={},positions=pack", of={tokens: tokens for tokens in (192, 128, 64)}),
        640: "dominant=540,contextual=100,positions=pack",  # of five crops: 108 + 20 each
        320: "dominant=270,contextual=50,positions=pack",  # 54 + 10
        160: "dominant=135,contextual=25,positions=pack",  # 27 + 5
        0.333: "dominant=0.281,contextual=0.052",
        0.222: "dominant=0.1873,contextual=0.0347",
        0.111: "dominant=0.0937,contextual=0.0173",
    }
    growth = "n^2"  # every merged token is compared with every contextual one

    dominant: int | float | None = None
    contextual: int | float | None = None
    tokens: int | None = None
    count_cls: bool = False
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        both = self._both
        object.__setattr__(self, "dominant", both.dominant)
        object.__setattr__(self, "contextual", both.contextual)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        features, project = ctx.given("features"), ctx.given("project")
        seen, quota = vision_of(ctx, self.vision_layer, crops), quota_of(ctx, self, crops)
        scores, keys, counts = seen.received(), mean_keys(seen), self._both.counts
        firsts = crops.shared_out([counts(n)[0] for own in ctx.images() for n in own]).kept

        def zipped(kind: Kind, _: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            dominant, _ = ops.select_topk(crops.take(scores, kind), firsts[kind.members[0]])
            own, key = crops.take(features, kind), crops.take(keys, kind)
            targets, merged, into = merged_targets(own, key, dominant, kind.kept - dominant.shape[1])
            return dominant, targets, project(merged), into

        return kept_and_made(ctx, crops, quota, self.positions, zipped, firsts)

    def at(self, share: float) -> Self:
        """``share`` as both, in the proportion that they have."""
        dominant, merged = self._both.shares(share_of(share))
        return replace(self, dominant=dominant, contextual=merged, tokens=None, count_cls=False)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return round(images * sum(self._both.counts(round(tokens / images)))) if tokens else 0

    @property
    def _both(self) -> TwoBudgets:
        return TwoBudgets.of(self.dominant, self.contextual, self.tokens, self.count_cls)
