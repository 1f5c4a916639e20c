"""Query rows and keys of one attention layer, taken from its own projections and cache: no attention matrix, any backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlmprune.models.forward import Forward, Rope
from vlmprune.models.kv_cache import extend_validity, past_validity, pruned_layer
from vlmprune.models.layout import Layout, TextSpan, last_rows, text_rows
from vlmprune.policies.base import AttentionInputs, Needs


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE on ``x [B, H, S, D]`` with tables ``[B, S, D]`` (Su et al. 2021, as Llama applies it)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def heads(x: Tensor, head_dim: int) -> Tensor:
    """``[B, S, H * D]`` to ``[B, H, S, D]``."""
    return x.view(*x.shape[:2], x.shape[-1] // head_dim, head_dim).transpose(1, 2)


def read_attention(attn: Any, kwargs: dict[str, Any], forward: Forward, needs: Needs) -> AttentionInputs:
    """What the stage after a decoder layer may score from, read when its self-attention ``attn`` has run.

    Keys come from the cache the layer has just filled; without a cache they are projected once more.
    """
    hidden, rope = kwargs["hidden_states"], kwargs["position_embeddings"]
    cache: Cache | None = kwargs.get("past_key_values")
    layout = forward.layout_before(attn.layer_idx + 1)
    key = _project_keys(attn, hidden, rope) if cache is None else cache.layers[attn.layer_idx].keys
    past = key.shape[2] - layout.rows
    layer = pruned_layer(cache, attn.layer_idx)
    if layer is not None:  # it has already taken this chunk in
        mask = layer.validity(key.shape[2])
    else:
        mask = extend_validity(_past(cache, attn, forward), past, layout.valid, layout.rows)
    return _read(attn, hidden, rope, key, mask, layout, forward.text, needs)


def read_own_attention(
    layer: Any,
    hidden: Tensor,
    rope: Rope,
    cache: Cache | None,
    layout: Layout,
    forward: Forward,
    needs: Needs,
) -> AttentionInputs:
    """What decoder layer ``layer`` will see of the rows that enter it: its norm and projections, run ahead of it."""
    attn, hidden = layer.self_attn, layer.input_layernorm(hidden)
    key, past = _project_keys(attn, hidden, rope), 0
    if cache is not None and attn.layer_idx < len(cache.layers):
        held = cache.layers[attn.layer_idx]
        if held.is_initialized and held.keys.numel():
            key, past = torch.cat([held.keys, key], dim=2), held.keys.shape[2]
    mask = extend_validity(_past(cache, attn, forward), past, layout.valid, layout.rows)
    return _read(attn, hidden, rope, key, mask, layout, forward.text, needs)


def _read(
    attn: Any,
    hidden: Tensor,
    rope: Rope,
    key: Tensor,
    key_mask: Tensor | None,
    layout: Layout,
    text: TextSpan | None,
    needs: Needs,
) -> AttentionInputs:
    """Project the query rows that are needed (one, for "last") and put everything into key positions."""
    batch, n = hidden.shape[:2]
    past = key.shape[2] - n
    cos, sin = (t.expand(batch, -1, -1) for t in rope)
    wanted: tuple[Tensor, ...] = (hidden, cos, sin)
    last = last_rows(layout)
    if needs.rows == "last":
        wanted = tuple(_pick(t, last) for t in wanted)
        # This one query stands for the last position: whatever lies between it and the end is padding, and masked.
        rows = last = torch.full_like(last, key.shape[2] - 1)
    else:
        if needs.rows == "text":
            assert text is not None
            wanted = tuple(t[:, max(0, n - text.reach) :] for t in wanted)
            rows = text_rows(layout, text)
        else:
            order = torch.arange(n, device=hidden.device).expand(batch, -1)
            rows = order if layout.valid is None else torch.where(layout.valid, order, -1)
        rows, last = torch.where(rows >= 0, rows + past, -1), last + past
    return AttentionInputs(
        query=rotate(heads(attn.q_proj(wanted[0]), attn.head_dim), *wanted[1:]),
        key=key,
        last=last,
        rows=rows,
        columns=torch.where(layout.columns >= 0, layout.columns + past, -1),
        key_mask=key_mask,
        rope=(cos, sin),
        scale=attn.scaling,
    )


def _past(cache: Cache | None, attn: Any, forward: Forward) -> Tensor | None:
    return past_validity(cache, attn.layer_idx, forward.seen, forward.q)


def _project_keys(attn: Any, hidden: Tensor, rope: Rope) -> Tensor:
    """Rotated keys ``[B, Hkv, n, D]`` of the rows entering a layer's attention."""
    cos, sin = (t.expand(hidden.shape[0], -1, -1) for t in rope)
    return rotate(heads(attn.k_proj(hidden), attn.head_dim), cos, sin)


def _pick(x: Tensor, at: Tensor) -> Tensor:
    """Row ``at[b]`` of ``x [B, S, D]``, as ``[B, 1, D]``."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
