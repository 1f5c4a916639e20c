"""The mapper of ACCM's captioner: from any number of visual tokens to a prefix in the language model's space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmprune.compensation.blocks import Block, block_flops


class Mapper(nn.Module):
    """``Linear(D -> W)``, the learned prefix behind, transformer layers over all; what the prefix became is the answer.

    As in ClipCap (https://arxiv.org/abs/2111.09734) and ACCM, without positions: no order of the tokens is known, so any
    subset of any image fits.

    Args:
        feature_width: D, of the visual tokens.
        width: W, of the language model's embeddings.
        prefix: vectors of the prefix, P.
        layers: transformer layers.
        heads: of their attention.
        ratio: width of their feed-forward part, in W.
    """

    def __init__(
        self, feature_width: int, width: int, prefix: int, layers: int, heads: int, ratio: int
    ) -> None:
        super().__init__()
        self.ratio = ratio
        self.project = nn.Linear(feature_width, width)
        self.prefix = nn.Parameter(torch.randn(prefix, width))
        blocks = (Block(width, heads, ratio, "relu", bias=False, dropout=0.0) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, features: Tensor, real: Tensor | None) -> Tensor:
        """``features [I, R, D]``, ``real [I, R]`` False = padding (None = there is none) -> ``[I, P, W]``."""
        prefix = self.prefix.expand(len(features), -1, -1)
        x = torch.cat([self.project(features), prefix], dim=1)
        if real is not None:
            real = torch.cat([real, real.new_ones(prefix.shape[:2])], dim=1)
        for block in self.blocks:
            x = block(x, real)
        return x[:, -prefix.shape[1] :]

    def flops(self, rows: int) -> int:
        """FLOPs for one image of ``rows`` tokens, padding included."""
        width, features = self.project.weight.shape
        layer = block_flops(width, self.ratio, rows + len(self.prefix))
        return 2 * rows * width * features + len(self.blocks) * layer
