"""ZOO-Prune: visual tokens on which the projector depends most, none of them like another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import spent
from vlmprune.policies.checks import check_keep, check_number, check_seed, check_whole
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.spectrum import drawn
from vlmprune.policies.parts.turns import Rule, taken_in_turn, unit_rows

AT_ONCE = 8
"""Directions that go through the projector together: all of them would take gigabytes."""


@dataclass(frozen=True)
class ZOOPrune(PruningPolicy):
    """Keeps, one after another, the token of highest sensitivity times distance to the nearest kept one.

    Sensitivity is how far a token's projected feature moves, on average, if its feature before the projector moves by a small
    step there and back in ``directions`` random directions, the same for all tokens. It is scaled to 0..1 over the tokens that
    are chosen from together, 1 for all where they are equal; the first choice goes by it alone. Distance is 1 - cosine of
    projected features. The released code draws other directions at each call; here they are those of ``seed``, on every device.

    What it costs: 2 · ``directions`` rows through the projector for each visual token, 73,728 for an image of LLaVA-1.5. By
    count that is 3.1 TFLOP of its 7B model, 36 % of the prefill of 640 tokens of which none is pruned (8.5), and more than that
    of the 128 that a budget of 64 leaves (1.7). Fewer directions cost less in proportion (the paper finds 16 to 160 alike).

    What it needs: a step that the dtype can hold. Of the paper's 0.01, shared out over a thousand entries, bfloat16 leaves 0.4,
    and what it rounds counts fourfold; a ``step`` of 1 measures there what 0.01 does in float32 (rank correlation 0.997 and
    0.952, for random features and a random projector 1024 features wide; the paper finds 0.0001 to 1 alike).

    Args:
        keep: tokens per image (int; published budgets 192, 128, 64) or share (float), shared out evenly over its crops, each
            chosen from by itself (``spend="crop"``, as released for LLaVA-NeXT, which keeps all newline tokens beside).
        directions: how many, at least 1.
        step: length of a step, in units of the features, above 0.
        seed: which directions.
        vision_layer: a layer of the vision tower; asked for as the features come with it, whichever it is.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
        spend: "crop": each crop keeps its share; "image": every image is chosen from as one; "prompt": all images of a prompt
            are.
    """

    summary = "tokens on which the projector depends most, unlike each other"
    paper = (
        "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models "
        "(CVPR 2026), arXiv 2509.24837"
    )
    formula = (
        "d_m = random unit vector, by seed, m = 1 … directions\n"
        "g_j = mean_m |project(v_j + step · d_m) - project(v_j - step · d_m)| / (2 · step)\n"
        "r_j = (g_j - min g) / (max g - min g)\n"
        "in every crop keep the j of highest r_j  (spend='crop')\n"
        "then that of highest r_j · min_i (1 - cos(x_i, x_j)) over the kept i, until k are kept"
    )
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^2"  # cosines of all pairs

    keep: int | float = 64
    directions: int = 64
    step: float = 0.01
    seed: int = 0
    vision_layer: int = -2
    positions: Positions = "keep"
    spend: Literal["prompt", "image", "crop"] = "crop"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_whole("directions", self.directions, least=1)
        check_number("step", self.step, above=0)
        check_seed(self.seed)
        check_whole("vision_layer", self.vision_layer)

    layers = (0,)  # before the language model

    def needs(self, layer: int) -> Needs:
        """Projected features, and with a vision layer those before the projector."""
        return Needs(hidden=True, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        hidden = ctx.given("hidden")
        by_sample = unit_rows(hidden), crops.spread(self._sensitivity(ctx))
        return spent(ctx, self, taken_apart, *by_sample, positions=self.positions)

    def _sensitivity(self, ctx: TokenContext) -> Tensor:
        """Mean length ``[I, T]`` float32 of what the projector's output moves by for a step there and back."""
        features = ctx.given("features")
        project = ctx.given("project")
        (crops, tokens, width), total = features.shape, torch.zeros((), device=features.device)
        unit = unit_rows(drawn(self.seed, self.directions, width, features.device))
        for first in range(0, self.directions, AT_ONCE):
            some = self.step * unit[first : first + AT_ONCE]
            moves = some.to(features.dtype)[:, None, None]
            there, back = (
                project((features + way * moves).view(-1, tokens, width))
                .float()
                .view(len(some), crops, tokens, -1)
                for way in (1, -1)
            )
            total = total + torch.linalg.vector_norm(there - back, dim=-1).sum(0)
        return total / (2 * self.step * self.directions)


def taken_apart(kept: list[int], mask: Tensor | None, unit: Tensor, sensitivity: Tensor) -> Tensor:
    """Places ``[G, K]`` by directions ``[G, P, D]`` and sensitivities ``[G, P]``, of which NaN and infinities are none."""
    weight = sensitivity.nan_to_num(0.0, 0.0, 0.0)
    least, most = weight, weight
    if mask is not None:
        least, most = (weight.masked_fill(~mask, end) for end in (float("inf"), float("-inf")))
    least, most = least.amin(1, keepdim=True), most.amax(1, keepdim=True)
    weight = torch.where(most > least, (weight - least) / (most - least), 1.0)
    return taken_in_turn(_apart(unit, weight), kept, mask)


def _apart(unit: Tensor, weight: Tensor) -> Rule:
    """Weight, and from the second choice on times the distance to the nearest one taken."""
    best = yield weight
    gap = torch.full_like(weight, 2.0)
    while True:
        row = unit.gather(1, best[:, None, None].expand(-1, 1, unit.shape[2]))
        gap = torch.minimum(gap, (1 - (row @ unit.mT)[:, 0]).clamp(min=0))
        best = yield weight * gap
