"""The transformer layers of mapper and selector, and their FLOPs."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vlmprune.errors import check

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class Block(nn.Module):
    """One pre-norm layer: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``. It knows no positions."""

    def __init__(
        self, width: int, heads: int, ratio: int, activation: str, bias: bool, dropout: float
    ) -> None:
        super().__init__()
        check(width % heads == 0, "heads", f"a divisor of the width {width}", heads)
        self.heads, self.activation, self.dropout = heads, activation, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """``x [B, N, W]``, ``real [B, N]`` False = a padding that nothing looks at, None = there is none."""
        x = x + self._drop(self._attend(self.attention_norm(x), real))
        inner = self._drop(ACTIVATIONS[self.activation](self.up(self.norm(x))))
        return x + self._drop(self.down(inner))

    def _attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(x).chunk(3, -1)
        )
        mask = None if real is None else real[:, None, None]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def block_flops(width: int, ratio: int, rows: int) -> int:
    """FLOPs of one layer for one sequence of ``rows``: its six matrices, scores and values."""
    return 2 * rows * (4 + 2 * ratio) * width**2 + 4 * rows**2 * width
