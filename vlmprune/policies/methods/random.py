"""The random baseline: visual tokens drawn without looking at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.constants import remembered
from vlmprune.policies.base import PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import SEEDS, check_keep, check_layer, check_seed


@dataclass(frozen=True)
class Random(PruningPolicy):
    """Keeps a uniformly random subset, the same one at every call with the same seed and on every device.

    Each sample has a draw of its own, which depends on the seed and the sample's place in the batch alone.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        seed: which draw.
        spend: "prompt": the best tokens of all images of a prompt stay; "image": every image keeps its own budget; "crop":
            which is shared out over its crops (tiles, small view, frames).
    """

    summary = "a random subset, fixed by a seed"
    paper = "baseline; random tokens of FastV (K = 0), arXiv 2403.06764"
    formula = "s_j = random from [0, 1), by seed\nkeep the k highest s_j"
    presets = each("layer=0,keep={}")
    growth = "n"

    layer: int = 2
    keep: int | float = 0.5
    seed: int = 0
    spend: Literal["prompt", "image", "crop"] = "prompt"

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_keep(self.keep)
        check_seed(self.seed)

    def rank(self, ctx: TokenContext) -> Ranking:
        return ranked(ctx, self, drawn(self.seed, ctx.counts, ctx.device), static=True)


@remembered()
def drawn(seed: int, counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Random numbers ``[B, N]`` for samples of so many tokens, zeros at padding."""
    # On the CPU whatever the device: generators of different devices draw different numbers.
    draw = torch.Generator().manual_seed(seed)
    seeds = torch.randint(SEEDS - 1, (len(counts),), generator=draw).tolist()
    scores = torch.zeros(len(counts), max(counts, default=0))
    for row, tokens, own in zip(scores, counts, seeds, strict=True):
        row[:tokens] = torch.rand(tokens, generator=draw.manual_seed(own))
    return scores.to(device)
