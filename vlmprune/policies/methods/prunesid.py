"""PruneSID: patches in groups by principal axis, of each group the most attended ones unlike each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import gathered, quota_of, vision_of
from vlmprune.policies.checks import check_keep, check_seed
from vlmprune.policies.choose import rank_within
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.apportion import shared_out
from vlmprune.policies.parts.spectrum import main_axis
from vlmprune.policies.parts.turns import in_order, outlived, unit_rows

MEMBERS = 4
"""Kept tokens for each principal axis."""


@dataclass(frozen=True)
class PruneSID(PruningPolicy):
    """Groups a crop's patches by the principal axis of their features that each is most of, and keeps some of every group.

    Of k tokens k/4 axes make groups: right singular vectors of the features behind a sigmoid, features as rows and patches as
    columns, each column minus its mean. In a group patches go by falling CLS attention, but one that resembles a kept one,
    with a cosine above k/32 times the crop's mean cosine, goes behind all others. Every group keeps one; the rest is shared
    out by how many of a group have not gone behind (running sums in the order of the axes are rounded), up to a bound: as many
    as these, at most 5 for every 64 of k begun, raised by one and another one until the bounds add up to k. What is then
    missing goes to the groups where most have not gone behind.

    The released code draws a random subspace for the axes at each call, so its choice varies from call to call; here it is
    that of ``seed``. Its T tokens are the CLS row and T - 1 patches; here k are patches.

    Args:
        keep: k, tokens per image (int; published budgets 192, 128, 64) or share (float), shared out evenly over its crops,
            each of which is chosen from by itself with its own k.
        vision_layer: vision-tower layer whose attention is read.
        seed: of the random subspace.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
    """

    summary = "some patches of every principal axis, by CLS attention, unlike each other"
    paper = (
        "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity "
        "(ICLR 2026), arXiv 2603.09480"
    )
    formula = (
        "w_m = right singular vector m = 1 … k/4 of all sigmoid(v_j), columns j, each minus its mean\n"
        "s_j = mean_h V[vision_layer][h, CLS, j];  j is of the group m of highest |w_m[j]|\n"
        "by falling s_j, j goes behind if an i of its group stays with cos(v_i, v_j) > k/32 · mean of all\n"
        "c_m = how many of m stay;  a_m = 1 + (k - groups) · c_m / ∑ c, rounded, at most 5 ⌈k/64⌉ and c_m\n"
        "in every crop keep the a_m first of every group m, and more of those of highest c_m until k are kept"
    )
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^2"  # cosines of all pairs

    keep: int | float = 64
    vision_layer: int = -2
    seed: int = 0
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_seed(self.seed)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        """Query and key of the vision layer; the features come with them."""
        return Needs(vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        quota = quota_of(ctx, self, crops)
        scores = vision_of(ctx, self.vision_layer, crops).received().nan_to_num(0.0, 0.0, 0.0)
        features = ctx.given("features")
        picked = []
        for kind in crops.kinds(quota):
            own = crops.take(features, kind), crops.take(scores, kind)
            picked.append((kind, kept_of_groups(*own, kind.kept, kind.kept, self.seed)))
        return gathered(ctx, crops, quota, crops.together(picked), self.positions)


def kept_of_groups(features: Tensor, scores: Tensor, keep: int, budget: int, seed: int) -> Tensor:
    """Places ``[I, keep]`` of the patches of ``features [I, P, D]`` that stay, ascending; groups are made for ``budget``."""
    P, axes = scores.shape[1], max(1, budget // MEMBERS)
    if keep in (0, P):
        return torch.arange(keep, device=scores.device).expand(len(scores), -1)
    order = scores.argsort(dim=1, descending=True, stable=True)
    squashed = features.float().nan_to_num(0.0, 0.0, 0.0).sigmoid()
    group = main_axis(squashed, axes, seed).gather(1, order)
    unit = unit_rows(features)
    cosine = unit @ unit.mT
    mean = (cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / (P * (P - 1))
    close = in_order(cosine, order) > (budget / 32 * mean)[:, None, None]
    behind = outlived(close & (group[:, :, None] == group[:, None, :]))
    own = group[:, :, None] == torch.arange(axes, device=scores.device)
    stay = shared_out(own.sum(1), (own & ~behind[:, :, None]).sum(1), keep, budget)
    first = rank_within((~behind).float(), group) < stay.gather(1, group)  # those behind rank last
    return ops.select_topk(torch.zeros_like(scores).scatter_(1, order, first.float()), keep)[0]
