"""Key tokens: those of every crop to which a vision layer attends most, found again among what earlier stages have left."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from vlmprune.policies.base import TokenContext
from vlmprune.policies.by_image import best_of_each, vision_of
from vlmprune.policies.choose import marks
from vlmprune.policies.crops import crops_of


def key_tokens(ctx: TokenContext, layer: int, share: float) -> Tensor:
    """``[B, N]`` bool, which of the entering tokens are among the ``ceil(share P)`` most attended of their crop's P.

    By the attention of CLS in that vision layer, head mean; without a CLS token by the mean attention received.
    """
    crops = crops_of(ctx, unpruned=True)
    if not crops.tokens or share == 0:
        return torch.zeros_like(ctx.mask)
    attended = vision_of(ctx, layer, crops).received()
    counts = tuple(ceil(share * n - 1e-9) for n in crops.tokens)
    chosen = marks(best_of_each(crops, attended, counts), attended.shape[1])
    return ctx.mask & crops.spread(chosen).gather(1, ctx.ordinals.clamp(min=0))
