"""What tokens receive in a vision layer, by sample, or otherwise than ``VisionAttention.received`` has it.

That is from all rows or from all other patches, before the softmax, or by one head made of all; and which receive most.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from vlmprune.constants import counting
from vlmprune.policies.base import TokenContext, VisionAttention
from vlmprune.policies.by_image import best_of_each, vision_of
from vlmprune.policies.choose import marks
from vlmprune.policies.crops import crops_of


def attended(ctx: TokenContext, layer: int) -> Tensor:
    """What each visual token of every sample receives in one layer, ``[B, N]`` float32; -1 for those of no crop (newlines)."""
    crops = crops_of(ctx)
    if not crops.tokens:
        return ctx.mask.float()
    return crops.spread(vision_of(ctx, layer, crops).received(), fill=-1)


def received_from_all(seen: VisionAttention) -> Tensor:
    """Attention that the patches of every token receive from a mean row of the crop, CLS among the rows: ``[I, T]`` float32."""
    if not seen.cls:
        return seen.received()
    groups, _, places, _ = seen.key.shape
    return _received(seen, rows=counting(groups, places, seen.key.device))


def received_logits(seen: VisionAttention) -> Tensor:
    """Attention logits of the CLS row, or the mean over all rows, of every token's patches: ``[I, T]`` float32, head mean."""
    return _received(seen, normalize="none")


def received_from_others(seen: VisionAttention) -> Tensor:
    """Attention that the patches of every token receive from all other patches, head mean, as a sum: ``[I, T]`` float32.

    It is made of all patches at once: 4 bytes for each two of them and each head.
    """
    logits = seen.query.float() @ seen.key.float().mT * seen.scale
    if seen.mask is not None:
        logits = logits.masked_fill(~seen.mask[:, None, None], float("-inf"))
    paid = logits.softmax(3)[:, :, int(seen.cls) :, int(seen.cls) :].mean(1)
    itself = torch.eye(paid.shape[1], dtype=torch.bool, device=paid.device)
    paid = paid.masked_fill(itself, 0.0)
    if seen.mask is not None:
        paid = paid.masked_fill(~seen.mask[:, :, None], 0.0)
    return seen.per_token(paid.sum(1))


def joined_attention(seen: VisionAttention) -> Tensor:
    """As ``received``, with all heads as one: ``softmax(q k^T / sqrt(H D))``; a sum over heads before the softmax."""
    query, key = (x.transpose(1, 2).flatten(2).float() for x in (seen.query, seen.key))
    rows = query[:, :1] if seen.cls else query
    logits = rows @ key.mT * key.shape[2] ** -0.5
    if seen.mask is None:
        paid = logits.softmax(2)[..., int(seen.cls) :]
        return seen.over_rows(paid.sum(1), paid.shape[1])
    share = logits.masked_fill(~seen.mask[:, None], float("-inf")).softmax(2)
    share = share.masked_fill(~seen.mask[:, :, None], 0.0)
    return seen.over_rows(share.sum(1), seen.mask.sum(1, keepdim=True))


def _received(seen: VisionAttention, **how: Any) -> Tensor:
    """``received`` by a scoring that differs in this."""
    rating = seen.rating()
    tokens = seen.per_token(rating._replace(scoring=rating.scoring._replace(**how)).scores())
    return tokens if seen.rows is None else tokens / seen.rows


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
