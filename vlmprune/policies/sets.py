"""A kept set in its two forms: marks on the tokens entering a stage, and the index by which tokens are gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune import ops


def marks(index: Tensor, tokens: int) -> Tensor:
    """Turn an index ``[B, K]`` int64 (-1 = padding) into bool ``[B, tokens]``, True = kept."""
    spare = torch.where(index < 0, tokens, index)  # padding lands in a column that is cut off again
    out = torch.zeros(index.shape[0], tokens + 1, dtype=torch.bool, device=index.device)
    return out.scatter_(1, spare, True)[:, :tokens]


def index_of(kept: Tensor) -> Tensor:
    """Turn marks ``[B, N]`` bool into an index ``[B, K]`` int64, ascending, -1 on the right.

    K is what the fullest sample keeps, which only the device knows: one host read.
    """
    code = torch.where(kept, 1, 2).to(torch.int8)
    unranked = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
    index, count = ops.select_topk(unranked, 0, code=code)
    return index[:, : int(count.max())]
