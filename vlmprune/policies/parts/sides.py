"""The two sides of head-mean attention logits, query times key, of the visual tokens and of the text behind them."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.inputs import AttentionInputs


class Sides(NamedTuple):
    """Both sides of the head-mean logits ``query . key``, float32, zeros at padding: of visual tokens and of the text after.

    Attributes:
        query, key: ``[B, N, Hkv D]``; the query, summed over the heads that share a key, holds the scale.
        text_query, text_key: ``[B, T, Hkv D]``.
        words: ``[B, 1]`` how many the text has, 1 where it has none.
        seen: what they were made of, the heads of this rank; logits are those of all ranks.
    """

    query: Tensor
    key: Tensor
    text_query: Tensor
    text_key: Tensor
    words: Tensor
    seen: AttentionInputs

    @classmethod
    def of(cls, seen: AttentionInputs) -> Self:
        """From all rows of the prompt chunk."""
        seen = seen.chunk()
        (B, H, S, D), heads = seen.query.shape, seen.key.shape[1]
        query = seen.query.view(B, heads, H // heads, S, D).sum(2, dtype=torch.float32) * (seen.scale / H)
        flat = [x.transpose(1, 2).reshape(B, S, heads * D).float() for x in (query, seen.key)]
        after = seen.rows > seen.columns.amax(1, keepdim=True)
        text = torch.where(after, seen.rows, -1)
        visual, words = (ops.gather_tokens(flat, at) for at in (seen.columns, text))
        count = after.sum(1, keepdim=True).clamp(min=1)
        return cls(visual[0], visual[1], words[0], words[1], count, seen)

    def lacking(self, g: float) -> Tensor:
        """The negative of redundancy, ``[B, N]``: ``(1 - g) mean_t l(i, t) - g sum_j l(i, j)`` of logits l."""
        centre = g * self.key.sum(1) - (1 - g) * self.text_key.sum(1) / self.words
        return self.seen.across_ranks(-(self.query @ centre[..., None])[..., 0], "mean")

    def correlation(self, a: float, at: Tensor) -> Tensor:
        """``a l(i, j) + (1 - a) sum_t l(i, t) l(t, j)`` of visual tokens i ``at [B, r]`` and all j: ``[B, r, N]``.

        What is summed over t is summed before the product with the key of j.
        """
        query = ops.gather_tokens([self.query], at)[0]
        text = self.seen.across_ranks(query @ self.text_key.transpose(1, 2), "mean")
        mixed = a * query + (1 - a) * text @ self.text_query
        return self.seen.across_ranks(mixed @ self.key.transpose(1, 2), "mean")
