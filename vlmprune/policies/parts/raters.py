"""SparseVLM's text raters: the words of the prompt that the image calls up, and the attention they pay."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import AttentionInputs, TokenContext
from vlmprune.policies.inputs import Rating

Rated = TypeVar("Rated", Tensor, Rating)

GOLDEN = (5**0.5 - 1) / 2
"""Of its multiples modulo 1 the largest k lie spread evenly, for every k: the gaps between them have three lengths at most."""


def rater_weights(ctx: TokenContext) -> Tensor:
    """1 for every text row that is a rater, else 0: ``[B, T]`` float32, in the order of ``ctx.text``.

    ``r = mean_j softmax_over_text(H_v H_q^T)[j]`` from the input embeddings of all visual tokens and of the text after
    the last image; raters are the rows with ``r > mean(r)``, and all rows where none is above (equal ones).
    """
    embeds = ctx.given("embeds")
    text = ctx.given("text")
    at = ctx.given("image")
    sources = embeds, text, at
    known = ctx.shared.get(_weights)  # the same at every stage of a prompt
    if known is None or any(own is not other for own, other in zip(sources, known[0], strict=True)):
        known = ctx.shared[_weights] = sources, _weights(*sources)
    weights: Tensor = known[1]
    return weights


def _weights(embeds: Tensor, text: Tensor, at: Tensor) -> Tensor:
    """The weights, from embeddings ``[B, q, D]`` and positions of the text ``[B, T]`` and the images ``[B, N]``."""
    visual, words = (ops.gather_tokens([embeds], index)[0].float() for index in (at, text))
    real, seen = (text >= 0), (at >= 0).float()
    pull = (visual @ words.transpose(1, 2)).masked_fill(~real[:, None, :], float("-inf")).softmax(-1)
    r = torch.where(real, (pull * seen[..., None]).sum(1), 0.0) / seen.sum(1, keepdim=True).clamp(min=1)
    mean = r.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    above = (r > mean) & real
    return torch.where(above.any(1, keepdim=True), above, real).float()


def rated(scores: Rated, ctx: TokenContext) -> Rated | Tensor:
    """``scores [B, N]``, but in samples without text after the image an order whose best k, for any k, are spread evenly."""
    if ctx.words is not None and all(ctx.words):
        return scores
    known = scores.scores() if isinstance(scores, Rating) else scores
    text = ctx.given("text")
    even = torch.arange(known.shape[1], dtype=torch.float64, device=known.device) * GOLDEN % 1
    return torch.where((text >= 0).any(1, keepdim=True), known, even.float())


def row_attention(seen: AttentionInputs) -> Tensor:
    """Attention of every listed row to every visual column ``[B, H, R, N]`` float32; padding is 0.

    For the few rows and columns of a text and an image, where a method needs them one by one.
    """
    (B, H, Sq, D), (S, heads) = seen.query.shape, (seen.key.shape[2], seen.key.shape[1])
    lse = ops.row_lse(seen.query, seen.key, seen.rows, key_mask=seen.key_mask, scale=seen.scale)
    at = torch.where(seen.rows >= 0, seen.rows - (S - Sq), -1)
    query, key = (
        ops.gather_tokens([x], i)[0].float() for x, i in ((seen.query, at), (seen.key, seen.columns))
    )
    shared = query.view(B, heads, H // heads, at.shape[1], D)  # query heads that share a key head
    logits = torch.einsum("bghrd,bgnd->bghrn", shared, key).flatten(1, 2) * seen.scale
    real = (seen.rows >= 0)[:, None, :, None] & (seen.columns >= 0)[:, None, None, :]
    return (logits - lse[..., None]).masked_fill(~real, float("-inf")).exp()


def most_asked(ctx: TokenContext) -> Tensor:
    """The most that any head of any word behind the last image pays, softmax over all keys, without RoPE and causal mask.

    ``[B, N]`` float32. It is of the rows of one chunk; ``rated`` where a sample has no such words.
    """
    rating = ctx.given("attention").chunk().rating(unrotated=True, head_reduce="max", row_reduce="max")
    return rated(Rating(rating.scoring._replace(causal=False), rating.group).scores(), ctx)
