"""Tokens that join a set one by one, as a DPP takes them, each unlike those that are in it already."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import TokenContext

FIRST = 1e3
"""What a token that is there is worth to the DPP, where others are worth 1 at most: squared, more than rounding takes."""


def apart(scores: Tensor, features: Tensor, there: Tensor, mask: Tensor, kept: int) -> Tensor:
    """Scores that rank tokens as a DPP takes them one by one, when some are there already.

    Args:
        scores: float32 ``[B, N]``, what a token is worth by itself, at least 0.
        features: ``[B, N, D]``.
        there: bool ``[B, N]``, in the set from the start. Those that the others span to within rounding, as equal tokens do,
            are as if they were not: they add nothing.
        mask: bool ``[B, N]``, False = padding.
        kept: at most so many are in the set in the end, those that are there among them.

    Returns:
        float32 ``[B, N]``: the larger the earlier a token is taken; 0 = not at all, or it was there, or is padding.
    """
    N = mask.shape[1]
    if not kept:
        return torch.zeros_like(scores)
    own = scores.nan_to_num(0.0, 0.0, 0.0).masked_fill(there | ~mask, 0.0)
    own = own / own.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # The op sees the tokens by what they are worth: where nothing new is left all tie, and the first ones are taken.
    best = own.masked_fill(there | ~mask, -1.0).argsort(dim=1, descending=True, stable=True)
    features, worth = ops.gather_tokens([features, own.masked_fill(there, FIRST)], best)
    order = ops.greedy_select(features, kept, "dpp", relevance=worth, mask=mask.gather(1, best))[1]
    order = torch.where(order < 0, N, best.gather(1, order.clamp(min=0)))
    rank = torch.arange(kept, 0, -1, device=order.device, dtype=torch.float32).expand_as(order)
    return rank.new_zeros(len(order), N + 1).scatter(1, order, rank)[:, :N].masked_fill(there, 0.0)


def input_embeddings(ctx: TokenContext) -> Tensor:
    """Of the visual tokens that enter the stage, ``[B, N, D]``, zeros at padding: their projected features."""
    embeds = ctx.given("embeds")
    image = ctx.given("image")
    rows = image.gather(1, ctx.ordinals.clamp(min=0)).masked_fill(~ctx.mask, -1)
    return ops.gather_tokens([embeds], rows)[0]
