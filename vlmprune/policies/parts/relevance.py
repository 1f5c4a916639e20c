"""How relevant visual tokens are to the text, for methods whose papers ask CLIP, which LLaVA checkpoints carry half of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.errors import check
from vlmprune.policies.base import TokenContext
from vlmprune.policies.choose import marks

Relevance = Literal["text", "none"] | Callable[[TokenContext], Tensor]
"""``"text"``: ``text_similarity``; ``"none"``; or a function that returns ``[B, N]``, higher = more relevant."""


def check_relevance(relevance: object) -> None:
    """``relevance`` is a ``Relevance``."""
    known = relevance in ("text", "none") or callable(relevance)
    check(known, "relevance", "'text', 'none' or a function of the context", repr(relevance))


def relevance_of(ctx: TokenContext, relevance: Relevance) -> Tensor | None:
    """``[B, N]`` float32, or None for ``"none"``. Raises InputError if a function returns another shape."""
    if relevance == "none":
        return None
    if relevance == "text":
        return text_similarity(ctx)
    assert callable(relevance)
    found = relevance(ctx)
    right = found.shape == ctx.mask.shape
    check(right, "relevance", f"a function that returns {tuple(ctx.mask.shape)}", tuple(found.shape))
    return found.float()


def most_relevant(relevance: Tensor, count: int) -> Tensor:
    """Marks ``[i, N]`` bool of the ``count`` most relevant tokens by ``relevance [i, N]``, ties to the lower place.

    NaN and infinite ones are none of them, and where all others are equally relevant no token is.
    """
    sound = relevance.isfinite()
    score = relevance.masked_fill(~sound, float("-inf"))
    apart = score.amax(1) > score.masked_fill(~sound, float("inf")).amin(1)
    best, _ = ops.select_topk(score, count)
    return marks(best, score.shape[1]) & sound & apart[:, None]


def text_directions(ctx: TokenContext) -> Tensor:
    """Input embeddings of the text after the last image over their norms, ``[B, T, D]`` float32, zeros at padding."""
    embeds = ctx.given("embeds")
    text = ctx.given("text")
    at = text.clamp(min=0)[:, :, None].expand(-1, -1, embeds.shape[2])
    return normalize(embeds.gather(1, at).float(), dim=-1).masked_fill(text[:, :, None] < 0, 0.0)


def text_similarity(ctx: TokenContext) -> Tensor:
    """Mean cosine ``[B, N]`` float32 between each visual token and the text tokens; 0 where there is no text."""
    hidden = ctx.given("hidden")
    unit = text_directions(ctx)
    mean = unit.sum(1) / (ctx.given("text") >= 0).sum(1, keepdim=True).clamp(min=1)
    return (normalize(hidden.float(), dim=-1) @ mean[:, :, None])[..., 0]


def scaled(values: Tensor, mask: Tensor | None, least: float = 0.0, rounding: float = 0.0) -> Tensor:
    """``values [G, P]`` mapped to 0..1 over the tokens of each row; 1 for all where they are equal to within ``rounding``.

    Args:
        values: finite ones; others spoil their row.
        mask: ``[G, P]`` bool, False = padding; None = no padding.
        least: what is added to all before they are divided by the span.
        rounding: by how much equal tokens may differ.
    """
    if not values.shape[1]:
        return values
    low = high = values
    if mask is not None:
        low, high = (values.masked_fill(~mask, end) for end in (float("inf"), float("-inf")))
    low = low.amin(1, keepdim=True)
    span = high.amax(1, keepdim=True) - low
    return torch.where(span > rounding, (values - low + least) / span, 1.0)
