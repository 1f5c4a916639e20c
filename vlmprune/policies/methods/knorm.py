"""K-norm: keep the visual tokens with the shortest keys. No attention and no query is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlmprune import ops
from vlmprune.policies.base import Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import check_keep, check_layer
from vlmprune.policies.methods.fastv import FastV


@dataclass(frozen=True)
class KNorm(PruningPolicy):
    """Keeps the visual tokens whose keys in layer ``layer - 1``, averaged over the heads, have the smallest L2 norm.

    Short keys receive much attention: so Devoto et al. found (arXiv 2406.11430), and so ViTCoP ranks visual tokens inside
    the language model. This is the criterion of ViTCoP's deep stage as its released code has it: the keys of the cache,
    that is after RoPE, averaged over the heads before the norm (Devoto et al. take the norm in every head). Its other
    stages, CLS attention in the vision tower and clusters in the shallow layers, are not part of it.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones; at least 1.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        spend: "prompt": the best tokens of all images of a prompt stay; "image": every image keeps its own budget; "crop":
            which is shared out over its crops (tiles, small view, frames).
    """

    summary = "tokens with the shortest keys in the previous layer, without attention"
    paper = (
        "ViTCoP: Accelerating Large Vision-Language Models via Visual and Textual Semantic Collaborative Pruning "
        "(AAAI 2026), arXiv 2601.17818; A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, "
        "arXiv 2406.11430"
    )
    formula = "s_j = -‖mean_h k_j[K-1][h]‖₂\nkeep the k highest s_j"
    presets = FastV.presets  # as many tokens at the same layer
    growth = "n"

    layer: int = 2
    keep: int | float = 0.5
    spend: Literal["prompt", "image", "crop"] = "prompt"

    def __post_init__(self) -> None:
        check_layer(self.layer, 1, " (the keys come from the layer before)")
        check_keep(self.keep)

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous", keys_only=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = ctx.given("attention")
        mean = seen.across_ranks(seen.key.mean(1, dtype=torch.float32), "mean")
        keys = ops.gather_tokens([mean], seen.columns)[0]
        return ranked(ctx, self, -torch.linalg.vector_norm(keys, dim=2))
