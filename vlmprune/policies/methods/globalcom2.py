"""GlobalCom2: the small view commands how many tokens of each tile stay, and has half a say in which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import vision_of
from vlmprune.policies.checks import check_keep, check_number, check_share
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.received import received_logits
from vlmprune.policies.parts.tiles import HAIR, Tiled, over_areas, shared_over_tiles, stretched, tiled_images


@dataclass(frozen=True)
class GlobalCom2(PruningPolicy):
    """Keeps more of the tiles that the small view finds important, and in a tile what both of them find important.

    Scores are the CLS row's attention logits, mean over heads, of the last vision layer, as released. The small view keeps
    its share of the budget, by its own scores. A tile's share is larger or smaller by the softmax, over tiles, of what the
    small view's scores add up to in the area that the tile shows. In a tile its own scores and those of the small view,
    stretched over all tiles (bilinear), are mixed, each divided by its norm.

    Exactly the budget stays: what rounding, full tiles and tiles of unequal size leave over goes to all in turn, one token
    each, to tiles of larger share first and to the small view last (the released code keeps fewer); where tiles of unequal
    size would have more than there is, all get less. A tile's area is what is left of it without padding (released: the small
    view is cut into equal parts). Newline tokens go (released: all stay).

    An image of one crop keeps its best patches by its own scores, where the released code keeps everything; so does every
    frame of a video, an equal part each; and where the model takes every crop as an image (InternVL, Idefics3, SmolVLM), each
    of them. A tower without CLS is scored by the mean logit over all rows (not in the released code).

    Args:
        keep: tokens per image (int) or share (float; released: 0.25).
        alpha: how much of a tile's scores is the small view's, in [0, 1].
        temperature: by which its sums are divided before the softmax, above 0.
        vision_layer: vision-tower layer whose attention logits are read.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).
    """

    summary = "tiles' budgets and scores guided by the small view's CLS attention"
    paper = (
        "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large "
        "Vision-Language Models (AAAI 2026), arXiv 2501.05179"
    )
    formula = (
        "s_j = mean_h logit of V[vision_layer][h, CLS, j], before the softmax;  r = k / n of the image\n"
        "keep the ⌊r · n⌋ highest s_j of the small view;  g = its s_j, bilinear over the grid of all tiles\n"
        "every tile: σ = softmax_tiles(Σ s_j of the small view over its area / temperature)\n"
        "its m = ⌊r · n · (1 + σ - 1 / number of tiles)⌋, and 1 more by falling σ, until k are kept\n"
        "keep its m highest  alpha · g_j / ‖g‖ + (1 - alpha) · s_j / ‖s‖;  without tiles the k highest s_j"
    )
    presets = each("keep={}", counts=",positions=pack")
    growth = "n"  # of a tower with CLS; without, every patch looks at every other: n^2

    keep: int | float = 0.25
    alpha: float = 0.5
    temperature: float = 10.0
    vision_layer: int = -1
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_share("alpha", self.alpha)
        check_number("temperature", self.temperature, above=0)

    layers = (0,)  # before the language model
    spend = "image"

    def needs(self, layer: int) -> Needs:
        """Query and key of the vision layer."""
        return Needs(vision=(self.vision_layer,))

    def rank(self, ctx: TokenContext) -> Ranking:
        crops = crops_of(ctx)
        if not crops.tokens:
            return Ranking(ctx.mask.float(), ctx.counts)
        own = received_logits(vision_of(ctx, self.vision_layer, crops))
        scores = []
        for members, tiled in zip(crops.members, tiled_images(ctx, crops), strict=True):
            mine = own[members[0] : members[-1] + 1] if members else own[:0]
            scores.append(mine if tiled is None else self._mixed(mine, tiled))
        share = partial(self._shares, own)
        return shared_over_tiles(ctx, self, crops, torch.cat(scores), share, self.positions)

    def _shares(self, own: Tensor, k: int, tiled: Tiled) -> tuple[int, Tensor, Tensor]:
        """How many tokens of ``k`` the small view gets, and every tile, and by what the tiles get what is left over."""
        sizes = whole_numbers(tiled.sizes, own.device).double()
        ratio = min(k / (tiled.tokens + sum(tiled.sizes)), 1.0)
        first = int(ratio * tiled.tokens + 1e-6)
        sums = over_areas(own[tiled.first, : tiled.tokens].nan_to_num(0.0, 0.0, 0.0), tiled)
        sigma = (sums / self.temperature).softmax(0)
        wish = (ratio * sizes * (1 + sigma - 1 / len(tiled.parts))).minimum(sizes)
        wish = wish * ((k - first) / wish.sum()).clamp(max=1.0)
        return first, (wish + HAIR).floor().long(), sigma

    def _mixed(self, own: Tensor, tiled: Tiled) -> Tensor:
        """``[1 + tiles, T]`` the small view's scores, and those of the tiles mixed with them."""
        guide, real = stretched(own[0, : tiled.tokens], tiled, own.shape[1])
        local = own[1:].masked_fill(~real, 0.0)
        both = self.alpha * normalize(guide, dim=1) + (1 - self.alpha) * normalize(local, dim=1)
        return torch.cat([own[:1], both])
