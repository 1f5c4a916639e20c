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
    """

    query: Tensor
    key: Tensor
    text_query: Tensor
    text_key: Tensor
    words: Tensor

    @classmethod
    def of(cls, seen: AttentionInputs) -> Self:
        """From all rows of a prompt chunk."""
        (B, H, S, D), heads = seen.query.shape, seen.key.shape[1]
        query = seen.query.view(B, heads, H // heads, S, D).sum(2, dtype=torch.float32) * (seen.scale / H)
        flat = [x.transpose(1, 2).reshape(B, S, heads * D).float() for x in (query, seen.key)]
        after = seen.rows > seen.columns.amax(1, keepdim=True)
        text = torch.where(after, seen.rows, -1)
        visual, words = (ops.gather_tokens(flat, at) for at in (seen.columns, text))
        return cls(visual[0], visual[1], words[0], words[1], after.sum(1, keepdim=True).clamp(min=1))

    def lacking(self, g: float) -> Tensor:
        """The negative of redundancy, ``[B, N]``: of the ranks' own heads."""
        centre = g * self.key.sum(1) - (1 - g) * self.text_key.sum(1) / self.words
        return -(self.query @ centre[..., None])[..., 0]
