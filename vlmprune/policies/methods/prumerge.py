"""PruMerge and PruMerge+: keep the patches CLS attends to, add to each the ones most like it, and sum up the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import counting, remembered
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import gathered, vision_of
from vlmprune.policies.checks import check_flag, check_keep, check_whole
from vlmprune.policies.choose import marks
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.outlying import Picked, budget, in_raster_order, joined_attention, outliers, pick


@dataclass(frozen=True)
class PruMerge(PruningPolicy):
    """Keeps the patches with the most CLS attention, each with those most like it added, and one token for all the rest.

    Attention is that of one head made of all (``softmax(q k^T / sqrt(H D))``, as released). A kept patch gains its
    ``neighbours`` nearest others by the cosine of keys, kept or not, each times its CLS attention; the last token is the
    sum of the dropped ones, each times its attention. All of it is of the tower's features; the projector then sees the
    result.

    How many stay is ``keep``, or what an image's outliers decide: with ``adaptive`` those whose attention exceeds ``Q3 +
    1.5 (Q3 - Q1)``. PruMerge+ (``plus``) adds evenly spaced patches: as many as those by attention, at ``(2 i + 1) n / 2
    s`` for s of n (4, 12, 20, ... of the released 72 of 576), or with ``adaptive`` every ``floor(n / c / 3)``-th of n with
    c outliers.

    Beside the released functions on the same float32 tensors (576 patches) rows are equal to 1e-6 of the largest in 160 of
    160 runs of PruMerge by ratio and by outliers, in 40 of 40 of PruMerge+ by ratio where no spaced patch is among the
    best, and in 73 of 80 by outliers, the others having one token more. Where we differ from them: a budget counts the
    token for the rest, so that the released ratio of 1/8 is ``keep=73`` of 576, and 145 with ``plus``. A spaced patch that
    is there already is kept once, not twice, and the next by attention takes its place; the last patch may be a spaced one
    (theirs end at 574: the token more); an image without outliers keeps the best patch (the release none, and PruMerge+
    divides by zero), and one of which a third or more are outliers is no error; each image of a batch counts its own
    outliers. Where all tokens stay they stay as they are. Without a CLS token the mean attention that a patch receives
    stands in.

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
        check_whole("vision_layer", self.vision_layer)

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
        hidden = crops.split(ctx.given("hidden"))
        features = ctx.given("features")
        project = ctx.given("project")
        seen, quota = vision_of(ctx, self.vision_layer, crops), budget(ctx, self, crops)
        keys = seen.per_token(seen.key[:, :, int(seen.cls) :].transpose(1, 2).flatten(2))
        attention, places, rows = joined_attention(seen), [], []
        for kind in crops.kinds(quota):
            paid, own = crops.take(attention, kind), crops.take(hidden, kind)
            turn = self._turns(paid, kind.kept)
            picked = pick(turn, kind.kept, 2 * paid.shape[1] if self.adaptive else None)
            if self.positions == "pack":
                order = turn.gather(1, picked.first.clamp(min=0)).argsort(dim=1)
                picked = picked._replace(first=picked.first.gather(1, order))
            if self.adaptive or kind.kept < own.shape[1]:
                new = self._merged(picked, paid, crops.take(features, kind), crops.take(keys, kind))
                made = project(new).to(own.dtype)
            else:
                made = picked.of(own)
            places.append((kind, picked.places()))
            rows.append((kind, made))
        both = crops.together(places), crops.together(rows)
        choice = gathered(ctx, crops, quota, both[0], self.positions, both[1])
        return in_raster_order(choice, self.fixed_count)

    def _turns(self, paid: Tensor, kept: int) -> Tensor:
        """When each patch's turn is, ``[i, n]`` int64: first by attention, from n on spaced ones, from 2 n on the others."""
        n, (outlier, rank) = paid.shape[1], outliers(paid)
        if not self.adaptive and not self.plus:
            return rank
        at, late = counting(1, n, paid.device), 2 * n + rank
        if not self.adaptive:
            first = kept - (kept > 1)
            some = first // 2
            return torch.where(
                rank < first - some, rank, torch.where(evenly(some, n, paid.device), n + at, late)
            )
        count = outlier.sum(1, keepdim=True).clamp(min=1)
        if self.plus:
            late = torch.where(at % (n // count // 3).clamp(min=1) == 0, n + at, late)
        return torch.where(rank < count, rank, late)

    def _merged(self, picked: Picked, paid: Tensor, features: Tensor, keys: Tensor) -> Tensor:
        """Features ``[i, k, Dv]`` float32 of the kept patches and of the rest."""
        features, unit, n = features.float(), normalize(keys.float(), dim=-1), paid.shape[1]
        cosine = picked.of(unit) @ unit.mT
        itself = picked.first.clamp(min=0)[..., None]
        cosine = cosine.scatter(2, itself, float("-inf"))
        near, _ = ops.select_topk(cosine.flatten(0, 1), min(self.neighbours, n - 1))
        weight = paid[:, None].masked_fill(~marks(near, n).view_as(cosine), 0.0)
        merged = picked.of(features) + weight @ features
        if picked.rest is None:
            return merged
        gone = paid.masked_fill(picked.stays, 0.0)[:, None]
        return torch.cat([merged, gone @ features], 1)


@remembered()
def evenly(some: int, n: int, device: torch.device) -> Tensor:
    """Which of n places are the middles of ``some`` equal parts, ``[1, n]`` bool."""
    middles = {(2 * i + 1) * n // (2 * some) for i in range(some)}
    return torch.tensor([[i in middles for i in range(n)]]).to(device)
