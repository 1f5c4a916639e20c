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
from vlmprune.policies.parts.relevance import scaled
from vlmprune.policies.parts.spectrum import drawn
from vlmprune.policies.parts.turns import apart, taken_in_turn, unit_rows

AT_ONCE = 8
"""Directions that go through the projector together: all of them would take gigabytes."""


@dataclass(frozen=True)
class ZOOPrune(PruningPolicy):
    """Keeps, one after another, the token of highest sensitivity times distance to the nearest kept one.

    Sensitivity is how far a projected feature moves, on average, if the one before the projector makes a small step there and
    back in ``directions`` random directions, the same for all tokens. It is scaled to 0..1 over the tokens chosen from
    together, 1 where all are equal, and alone decides the first choice. Distance is 1 - cosine of projected features.

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
        seed: of the directions, the same on every device (the released code draws others at each call).
        vision_layer: a layer of the vision tower; asked for as the features come with it, whichever it is.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
        spend: "crop": each crop keeps its share; "image": each image is chosen from as one; "prompt": so is each prompt.
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

    layers = (0,)  # before the language model

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        by_sample = unit_rows(ctx.given("hidden")), crops.spread(self._sensitivity(ctx))
        return spent(ctx, self, taken_apart, *by_sample, positions=self.positions)

    def _sensitivity(self, ctx: TokenContext) -> Tensor:
        """Mean length ``[I, T]`` float32 of what the projector's output moves by for a step there and back."""
        features = ctx.given("features")
        project = ctx.given("project")
        (crops, tokens, width), total = features.shape, torch.zeros((), device=features.device)
        unit = unit_rows(drawn(self.seed, self.directions, width, features.device))
        for first in range(0, self.directions, AT_ONCE):
            moves = (self.step * unit[first : first + AT_ONCE]).to(features.dtype)[:, None, None]
            there, back = (project((features + way * moves).flatten(0, 1)).float() for way in (1, -1))
            moved = torch.linalg.vector_norm(there - back, dim=-1)
            total = total + moved.view(-1, crops, tokens).sum(0)
        return total / (2 * self.step * self.directions)


def taken_apart(kept: list[int], mask: Tensor | None, unit: Tensor, sensitivity: Tensor) -> Tensor:
    """Places ``[G, K]`` by directions ``[G, P, D]`` and sensitivities ``[G, P]``, of which NaN and infinities are none."""
    weight = scaled(sensitivity.nan_to_num(0.0, 0.0, 0.0), mask)
    return taken_in_turn(apart(unit, weight), kept, mask)
