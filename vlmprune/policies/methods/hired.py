"""HiRED: an early vision layer shares an image's budget out over its tiles, a late one chooses in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import vision_of
from vlmprune.policies.checks import check_keep, check_share, check_whole, check_word
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.tiles import Tiled, by_weight, over_areas, shared_over_tiles


@dataclass(frozen=True)
class HiRED(PruningPolicy):
    """Keeps in every crop the patches with the most CLS attention in a late vision layer, as many as an early one grants it.

    Of an image that the tower sees as a small view and tiles (LLaVA-NeXT, LLaVA-OneVision), the small view gets the share
    ``alpha`` of the budget. The tiles get the rest, in proportion to the CLS attention that an early layer of the small view
    pays to what each of them shows. An image of one crop is the authors' version for LLaVA-1.5: its best patches by the late
    layer. Where no crop is known to show all of an image (a video's frames), each gets as many; where the model takes every
    crop as an image (InternVL, Idefics3, SmolVLM), each has the budget of one.

    That is read off the paper's description, not off its equations. The released code counts instead how many of the small
    view's ``1 - alpha`` most attended patches lie in a tile's run of its raster, not in the tile's area: ``content="runs"``.
    It keeps fewer than the budget, as every tile's part is rounded down and one that a tile cannot take is lost; here what is
    left goes to all in turn, one token each, the tiles of most content first and the small view last. It also counts with the
    tiles' padding, which is cut away later.

    A tower without CLS is scored by the mean attention a patch receives from all patches (not in the paper). Newline tokens
    go, as released.

    Args:
        keep: tokens per image (int) or share (float; the paper's 0.2).
        alpha: share of an image's budget that its small view gets, in [0, 1].
        early_layer: vision-tower layer (first = 0) whose attention shares out.
        vision_layer: vision-tower layer whose attention chooses; -2 is the one whose output LLaVA projects.
        content: what a tile's part is proportional to: "area", the attention on what it shows, or "runs", as released.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
    """

    summary = "late CLS attention per tile, budgets by the small view's early CLS attention"
    paper = (
        "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models "
        "(AAAI 2025), arXiv 2408.10945"
    )
    formula = (
        "c_j = mean_h V[early_layer][h, CLS, j];  s_j = mean_h V[vision_layer][h, CLS, j]\n"
        "of the k of an image its small view gets m = ⌊alpha · k⌋\n"
        "every tile gets ⌊(k - m) · c / Σ_tiles c⌋,  c = Σ c_j over its area in the small view\n"
        "the tiles of highest c get what is left over, one each  (content='area')\n"
        "in every crop keep the highest s_j, as many as it gets; where there are no tiles, k"
    )
    checked = "reading"
    presets = each("keep={}", counts=",positions=pack")
    growth = "n"  # of a tower with CLS; without, every patch looks at every other: n^2

    keep: int | float = 0.2
    alpha: float = 0.5
    early_layer: int = 0
    vision_layer: int = -2
    content: Literal["area", "runs"] = "area"
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_share("alpha", self.alpha)
        check_whole("early_layer", self.early_layer)
        check_word("content", self.content, "area", "runs")

    layers = (0,)  # before the language model
    spend = "image"

    def needs(self, layer: int) -> Needs:
        """Query and key of both vision layers."""
        return Needs(vision=tuple(sorted({self.early_layer, self.vision_layer})))

    def rank(self, ctx: TokenContext) -> Ranking:
        crops = crops_of(ctx)
        if not crops.tokens:
            return Ranking(ctx.mask.float(), ctx.counts)
        late, early = (
            vision_of(ctx, layer, crops).received() for layer in (self.vision_layer, self.early_layer)
        )

        def share(k: int, tiled: Tiled) -> tuple[int, Tensor, Tensor]:
            content = self._content(early[tiled.first, : tiled.tokens], tiled)
            own = min(int(self.alpha * k + 1e-6), tiled.tokens)
            return own, by_weight(content, k - own), content

        return shared_over_tiles(ctx, self, crops, late, share, self.positions)

    def _content(self, early: Tensor, tiled: Tiled) -> Tensor:
        """``[tiles]`` float64, what each tile shows, by the small view's early attention ``[n]``."""
        if self.content == "area":
            return over_areas(early, tiled)
        n, tiles = len(early), len(tiled.parts)
        order = early.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        run = order[: int(n * (1 - self.alpha) + 1e-6)] * tiles // n
        return (run == torch.arange(tiles, device=run.device)[:, None]).sum(1).double()
