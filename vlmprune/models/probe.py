"""Query rows and keys of one attention layer, taken from its own projections and cache: no attention matrix, any backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlmprune.models.kv_cache import extend_validity, past_validity, pruned_layer
from vlmprune.models.layout import Layout, last_rows
from vlmprune.policies.base import AttentionInputs, Needs


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE on ``x [B, H, S, D]`` with tables ``[B, S, D]`` (Su et al. 2021, as Llama applies it)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def heads(x: Tensor, head_dim: int) -> Tensor:
    """``[B, S, H * D]`` to ``[B, H, S, D]``."""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def read_attention(
    attn: Any, kwargs: dict[str, Any], layout: Layout, seen: Tensor | None, needs: Needs
) -> AttentionInputs:
    """What a policy may score from, read after ``attn`` (a decoder layer's self-attention) has run.

    Only the query rows that are needed are projected (one, for "last"). Keys come from the cache the layer has just
    filled; without a cache they are projected once more.
    """
    hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
    batch, n = hidden.shape[:2]
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    cache: Cache | None = kwargs.get("past_key_values")
    key = _keys(attn, hidden, cos, sin, cache)
    past = key.shape[2] - n
    last = last_rows(layout)
    q_hidden, q_cos, q_sin = hidden, cos, sin
    if needs.rows == "last":
        q_hidden, q_cos, q_sin = (_pick(t, last) for t in (hidden, cos, sin))
    query = rotate(heads(attn.q_proj(q_hidden), attn.head_dim), q_cos, q_sin)
    if needs.rows == "last":
        # This one query stands for the last position: whatever lies between it and the end is padding, and masked.
        rows = last = torch.full_like(last, key.shape[2] - 1)
    else:
        order = torch.arange(n, device=hidden.device).expand(batch, -1)
        rows = torch.where(layout.valid, order + past, -1) if layout.valid is not None else order + past
        last = last + past
    return AttentionInputs(
        query=query,
        key=key,
        last=last,
        rows=rows,
        columns=torch.where(layout.columns >= 0, layout.columns + past, -1),
        key_mask=_key_mask(cache, attn.layer_idx, seen, past, layout),
        rope=(cos, sin),
        scale=attn.scaling,
    )


def _pick(x: Tensor, at: Tensor) -> Tensor:
    """Row ``at[b]`` of ``x [B, S, D]``, as ``[B, 1, D]``."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))


def _keys(attn: Any, hidden: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
    """Rotated keys ``[B, Hkv, S, D]`` of everything this layer can see."""
    if cache is None:
        return rotate(heads(attn.k_proj(hidden), attn.head_dim), cos, sin)
    return cache.layers[attn.layer_idx].keys


def _key_mask(cache: Cache | None, i: int, seen: Tensor | None, past: int, layout: Layout) -> Tensor | None:
    """``[B, S]`` False at padding, over the cached past and this chunk."""
    layer = pruned_layer(cache, i)
    if layer is not None:  # it has already taken this chunk in
        return layer.validity(past + layout.rows)
    q = layout.rows if seen is None else seen.shape[1] - past
    return extend_validity(past_validity(cache, i, seen, q), past, layout.valid, layout.rows)
