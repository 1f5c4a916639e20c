"""What contexts to try a policy on have of words: token ids, a table that embeds them, a tokenizer of numbered words, a last norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from vlmprune.policies.base import TokenContext

WORDS, IMAGE = 50, 49
"""How many words there are, and the one that stands for an image."""


class Words:
    """The tokenizer: token 7 is "w7". It has no chat template and no special tokens."""

    chat_template = None
    eos_token_id = bos_token_id = pad_token_id = None
    all_special_tokens: Sequence[str] = ()
    added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The words, blanks between them."""
        return " ".join(f"w{i}" for i in ids)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, Any]:
        """Their numbers; a word is numbered by its length, if it is none of these."""
        words = text.split()
        return {"input_ids": [int(w[1:]) % WORDS if w[1:].isdecimal() else len(w) for w in words]}


def with_tokens(ctx: TokenContext, image: Tensor, text: Tensor, seed: int = 2) -> TokenContext:
    """The same with ids, table and tokenizer.

    Args:
        ctx: the context.
        image, text: ``[B, ...]`` positions in the unpruned prompt of all visual tokens, and of the text behind the last
            image, -1 = padding.
        seed: which words.
    """
    assert ctx.hidden is not None
    g = torch.Generator().manual_seed(seed)
    last = torch.cat([image, text, torch.zeros(len(image), 1, dtype=torch.int64)], 1).amax(1, keepdim=True)
    order = torch.arange(int(last.max()) + 1)
    ids = torch.randint(1, IMAGE, (len(image), len(order)), generator=g)
    visual = (order[None, :, None] == image[:, None]).any(2)
    ids = torch.where(visual, IMAGE, ids).masked_fill(order > last, -1)
    table = torch.randn(WORDS, ctx.hidden.shape[2], generator=g)
    return replace(ctx, tokens=ids, embed=lambda at: table[at], tokenizer=Words)


def last_norm(states: Tensor) -> Tensor:
    """What stands for a text model's last norm: to unit root mean square, times a weight for each channel."""
    weight = torch.linspace(0.5, 2.0, states.shape[-1], device=states.device)
    return rms_norm(states.float(), states.shape[-1:], weight, 1e-6).to(states.dtype)
