"""What RoPE does to the score: the last row's attention over visual tokens at every layer of a Llama decoder, with and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlmprune import ops
from vlmprune.policies.choose import marks

TOP = 0.25
"""The share of tokens that counts as chosen: FEATHER's table of criteria keeps a quarter."""


def layer_scores(
    decoder: Any, hidden: Sequence[Tensor], columns: Tensor, key_mask: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each layer the scores phi_original and phi_-R of FEATHER, which differ in RoPE alone.

    Both are the softmax of the last row's logits over the visual tokens, mean over heads.

    Args:
        decoder: a transformers ``LlamaModel``.
        hidden: what enters each layer ``[B, S, D]`` (``output_hidden_states=True``; one more is ignored).
        columns: positions of the visual tokens ``[B, N]`` int64.
        key_mask: ``[B, S]`` bool, False = padding, on the left.

    Yields:
        Scores with and without RoPE, each ``[B, N]`` float32.
    """
    B, S, _ = hidden[0].shape
    rope = decoder.rotary_emb(hidden[0], torch.arange(S, device=hidden[0].device)[None])
    last = torch.full((B, 1), S - 1, dtype=torch.int64, device=hidden[0].device)
    for layer, entering in zip(decoder.layers, hidden, strict=False):
        attention, x = layer.self_attn, layer.input_layernorm(entering)
        query, key = (
            project(x).view(B, S, -1, attention.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rope)
        query = query[:, :, -1:]
        score = partial(
            ops.received_attention,
            query,
            key,
            rows=last,
            columns=columns,
            key_mask=key_mask,
            normalize="columns",
        )
        yield score(scale=attention.scaling, rope=None), score(scale=attention.scaling, rope=rope)


def top_share(scores: Tensor, where: Tensor) -> Tensor:
    """Of the best quarter of the tokens, the share that ``where`` [B, N] or [N] marks: ``[B]`` float32."""
    return (_top(scores) & where).sum(1) / _top(scores).sum(1)


def recall(scores: Tensor, where: Tensor) -> Tensor:
    """Of the tokens that ``where`` [B, N] marks, the share that is in the best quarter: ``[B]``; NaN if it marks none."""
    return (_top(scores) & where).sum(1) / where.sum(1)


def centre(scores: Tensor, height: Tensor) -> Tensor:
    """The mean of ``height`` [N], weighted by the scores: ``[B]``."""
    return (scores * height).sum(1) / scores.sum(1)


def _top(scores: Tensor) -> Tensor:
    index, _ = ops.select_topk(scores, int(scores.shape[1] * TOP))
    return marks(index, scores.shape[1])
