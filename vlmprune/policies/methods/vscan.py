"""VScan: global and local patches before the language model, the rest merged into them; text attention in the middle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import Needs, Positions, Ranking, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import gathered, quota_of, ranked, vision_of
from vlmprune.policies.checks import check_share, check_whole
from vlmprune.policies.groups import Groups, Kind
from vlmprune.policies.parts.merging import averaged_with_nearest
from vlmprune.policies.parts.two_stages import MergesFirst
from vlmprune.policies.parts.windows import best_of_windows


@dataclass(frozen=True)
class VScan(MergesFirst):
    """Keeps T patches of every image, then at one decoder layer the ones that the last prompt row attends to.

    Stage 1: ``int(T * local_ratio)`` patches are local: shared out evenly over the windows, in each window those with the
    most CLS attention in a shallow vision layer. The others of the T have the most CLS attention in a deep one. Every
    dropped row is merged into the kept row it is most cosine-similar to: the mean over all of them and the kept one, of
    projected features, as released.
    Stage 2: attention of the last prompt row, from the layer's own projections, softmax over the whole row, head mean.

    What the windows cannot share out evenly goes to the global patches, so exactly T are kept; the released code then
    keeps fewer (never at the published budgets). Windows cut off by the image's edge take part with what they have; the
    released code leaves them out (there are none in a 24 x 24 grid).

    Args:
        keep: T, tokens per image (int) or share (float), shared out evenly over its crops. LLaVA-1.5 at 64 tokens on average:
            96, then 32. 128 and 192 follow from the same two ratios: 192 and 64, 288 and 96.
        then: tokens per image (int) or share of the entering ones (float) that stage 2 keeps.
        layer: decoder layer of stage 2; at least 1.
        local_ratio: share of T chosen within windows, in [0, 1].
        window: rows and columns of a window.
        shallow_layer: vision-tower layer (first = 0) whose CLS attention ranks within windows.
        vision_layer: vision-tower layer whose CLS attention ranks the global patches.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: positions 0, 1, 2, ... after each stage).
    """

    summary = "global and windowed CLS attention with merging, then text attention mid-way"
    paper = (
        "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models (TMLR 2026), "
        "arXiv 2505.22654"
    )
    formula = (
        "stage 1, in every crop: m = ⌊⌊local_ratio · k⌋ / the number of its windows⌋\n"
        "of every window keep the m highest mean_h V[shallow_layer][h, CLS, j]\n"
        "of the others keep the highest mean_h V[vision_layer][h, CLS, j], until k are kept\n"
        "every dropped j joins the kept i of highest cos(x_i, x_j):  x_i ← mean of x_i and those x_j\n"
        "stage 2: s_j = mean_h A[K][h, last, j], of what enters layer K\n"
        "keep the k(then) highest s_j"
    )
    presets = {
        **{n: f"keep={3 * n // 2},then={n // 2},positions=pack" for n in (192, 128, 64, 640, 320, 160)},
        # the authors' are of 0.111; the other two follow from the same ratio
        **each("keep={},then=0.333,layer=14", of={0.333: 0.5, 0.222: 0.333, 0.111: 0.167}),
    }
    growth = "n^2"  # every dropped token is compared with every kept one

    keep: int | float = 96
    then: int | float = 32
    layer: int = 16
    local_ratio: float = 0.5
    window: int = 6
    shallow_layer: int = 5
    vision_layer: int = -2
    positions: Positions = "keep"
    spend = "crop"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("local_ratio", self.local_ratio)
        check_whole("window", self.window, 1)
        check_whole("shallow_layer", self.shallow_layer)

    def needs(self, layer: int) -> Needs:
        """Stage 1: two vision layers and the rows to merge. Stage 2: the layer's own query and key."""
        if layer == 0:
            return Needs(hidden=True, vision=tuple(sorted({self.shallow_layer, self.vision_layer})))
        return Needs(attention="own")

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = ctx.given("attention")
        return ranked(ctx, self, seen.rating(seen.last), self.positions, static=True)

    def first(self, ctx: TokenContext, crops: Groups) -> Tensor | Reduction:
        hidden, quota = crops.split(ctx.given("hidden")), quota_of(ctx, self, crops)
        layers = self.shallow_layer, self.vision_layer
        shallow, deep = (vision_of(ctx, layer, crops).received() for layer in layers)

        def scanned(kind: Kind) -> tuple[Tensor, ...]:
            grid, share = (kind.crop.rows, kind.crop.columns), int(kind.kept * self.local_ratio)
            local, count = best_of_windows(crops.take(shallow, kind), grid, self.window, share)
            others = kind.kept - count
            index, _ = ops.select_topk(crops.take(deep, kind), others, code=local.to(torch.int8))
            chosen = index[:, : kind.kept]
            return chosen, *averaged_with_nearest(crops.take(hidden, kind), chosen)

        picked, rows, into = crops.by_kind(quota, scanned)
        return gathered(ctx, crops, quota, picked, self.positions, rows, into)
