"""VisPruner: half of the kept patches are important, half are what remains after removing duplicates again and again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import gathered, quota_of, rows_at, vision_of
from vlmprune.policies.checks import check_keep, check_share
from vlmprune.policies.crops import crops_of

ROUND = 8
"""Duplicates removed per round in the released code."""


@dataclass(frozen=True)
class VisPruner(PruningPolicy):
    """Keeps ``int(T * important_ratio)`` patches by CLS attention and fills up to T with patches unlike each other.

    The rest starts in order of falling attention. Each round splits it into even and odd places, finds every even
    one's greatest cosine with an odd one, and removes the (at most 8) even ones where that is highest; the surviving
    even ones, by falling cosine, then go before the odd ones. Cosines are of the vision features before the projector.
    The number of rounds follows from the counts, so nothing waits for the device.

    The released code fails when a round has an odd number of patches, or fewer even ones than it is to remove; here
    such a round keeps all the even ones that are due, or removes no more than there are.

    The method is chaotic: what a round removes decides how the next one pairs the rest, so a last bit in one cosine changes
    the set. The released code, run in float32 and in float64 on the same 54 inputs, kept the same set in 23 of them, and never
    in float16 and float32; this one and the released one in float32 did in 31, with a mean Jaccard index of 0.84. Expect other
    sets on other devices, dtypes and batch sizes.

    Args:
        keep: T, tokens per image (int; published budgets 192, 128, 64) or share (float), shared out evenly over its crops:
            640 for five of LLaVA-NeXT are the released code's 128 for each.
        important_ratio: share of T chosen by attention, in [0, 1].
        vision_layer: vision-tower layer whose attention is read.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
    """

    summary = "important patches by CLS attention, diverse ones by duplicate removal"
    paper = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (ICCV 2025), "
        "arXiv 2412.01818"
    )
    formula = (
        "s_j = mean_h V[vision_layer][h, CLS, j]\n"
        "in every crop keep the ⌊important_ratio · k⌋ highest s_j; the others in falling order of s_j\n"
        "go through rounds, until k are kept in all:  E = those at places 0, 2, …,  O = at 1, 3, …\n"
        "m_i = max_{j ∈ O} cos(v_i, v_j) for i ∈ E;  the 8 highest m_i go, at most as many as have to\n"
        "next round: what is left of E in falling order of m_i, then O"
    )
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^3"  # rounds as many as an eighth of what is removed, of all pairs each

    keep: int | float = 64
    important_ratio: float = 0.5
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_share("important_ratio", self.important_ratio)

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
        scores = vision_of(ctx, self.vision_layer, crops).received()
        features = ctx.given("features")
        picked = []
        for kind in crops.kinds(quota):
            order = crops.take(scores, kind).argsort(dim=1, descending=True, stable=True)
            important = int(kind.kept * self.important_ratio)
            rest = order[:, important:]
            diverse = remove_duplicates(crops.take(features, kind), rest, kind.kept - important)
            picked.append((kind, torch.cat([order[:, :important], diverse], 1).sort(dim=1).values))
        return gathered(ctx, crops, quota, crops.together(picked), self.positions)


def remove_duplicates(features: Tensor, order: Tensor, keep: int) -> Tensor:
    """Thin ``order [I, R]`` (patch numbers) to ``[I, keep]`` by removing patches that resemble another one."""
    if keep == 0:
        return order[:, :0]
    rest = rows_at(normalize(features.float(), dim=-1), order)
    cosines = rest @ rest.mT
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    while place.shape[1] > keep:
        even, odd = place[:, ::2], place[:, 1::2]
        drop = min(ROUND, place.shape[1] - keep, even.shape[1])
        apart = cosines.new_full(order.shape, float("-inf")).scatter_(1, odd, 0.0)
        likest = rows_at(cosines, even).add_(apart[:, None]).amax(2)
        distinct = likest.argsort(dim=1, descending=True, stable=True)[:, drop:]
        place = torch.cat([even.gather(1, distinct), odd], 1)
    return order.gather(1, place)
