"""Query rows and keys of one attention layer, taken from its own projections and cache: no attention matrix, any backend."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlmprune.constants import counting, filled
from vlmprune.errors import ModelError
from vlmprune.models.clock import Clock
from vlmprune.models.host.cache_layers import QUANTIZED
from vlmprune.models.host.cache_view import entries, extend_validity, held_keys, past_validity
from vlmprune.models.host.names import attribute
from vlmprune.models.host.parts import heads
from vlmprune.models.layout import Layout, last_rows, moved
from vlmprune.models.prefill import Prefill, Rope, Wants
from vlmprune.policies.base import AttentionInputs, Needs


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE on ``x [B, H, S, D]`` with tables ``[B or 1, S, D]`` (Su et al. 2021, as Llama applies it)."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    if cos.shape[0] > 1:  # else they spread over samples and heads as they are
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return x * cos + turned * sin


@torch.compiler.disable  # type: ignore[untyped-decorator]
def read_attention(attn: Any, hidden: Tensor, rope: Rope, prefill: Prefill, clock: Clock) -> None:
    """Read what the stage after a decoder layer will score from, when its self-attention has run: ``prefill.attention``.

    Keys come from the cache the layer has just filled, or what stands in for it; without a cache they are projected once more.
    """
    i, call, cache = attn.layer_idx, prefill.call, prefill.cache
    # no_grad: recorded operations would differ when a checkpointed layer is replayed
    with clock.selection(i + 1), torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        layout = moved(prefill.layout(i), hidden.device)
        past = 0 if cache is None else entries(cache, i, call.past + call.length) - layout.length
        if prefill.waves is not None:
            key = prefill.waves.keys(i)
        elif cache is None or isinstance(cache.layers[i], QUANTIZED):
            key = _keys(attn, hidden, rope, prefill, past)
        else:
            key = held_keys(cache.layers[i], past + layout.length, hidden.device)
        needs, lse = prefill.wants.needs[i + 1], prefill.lse.pop(i, None)
        if prefill.rectified(i):  # scores are of attention to which nothing is added
            lse = None
        prefill.attention[i + 1] = _read(attn, hidden, rope, key, layout, prefill, needs, lse)


def read_own_attention(
    layer: Any, hidden: Tensor, rope: Rope, layout: Layout, prefill: Prefill, needs: Needs
) -> AttentionInputs:
    """What decoder layer ``layer`` will see of the rows that enter it: its norm and projections, run ahead of it."""
    attn, hidden = layer.self_attn, layer.input_layernorm(hidden)
    rope, layout = moved(rope, hidden.device), moved(layout, hidden.device)
    past = entries(prefill.cache, attn.layer_idx, prefill.call.past)
    key = _keys(attn, hidden, rope, prefill, past)
    return _read(attn, hidden, rope, key, layout, prefill, needs)


def read_rows(
    attn: Any,
    hidden: Tensor,
    rope: Rope,
    key: Tensor,
    rows: Tensor,
    columns: Tensor,
    key_mask: Tensor | None,
    wants: Wants,
) -> AttentionInputs:
    """What some of a layer's last rows, ``hidden [B, R, D]`` with their tables, look at: no stage, no layout.

    ``rows [B, R]`` and ``columns [B, N]`` are key positions of the layer's keys ``[B, Hkv, S, D]``, -1 = padding.
    """
    cos, sin = (t.expand(len(hidden), -1, -1) for t in rope)
    query = rotate(_project(attn, "q", hidden, wants.normed), cos, sin)
    return AttentionInputs(
        query=query,
        key=key,
        last=rows[:, -1:],
        rows=rows,
        columns=columns,
        key_mask=key_mask,
        rope=(cos, sin),
        scale=attn.scaling,
        group=_ranks(attn, query.shape[1], wants.heads),
    )


def _read(
    attn: Any,
    hidden: Tensor,
    rope: Rope,
    key: Tensor,
    layout: Layout,
    prefill: Prefill,
    needs: Needs,
    lse: Tensor | None = None,
) -> AttentionInputs:
    """Project the query rows that are needed (one, for "last") and put everything into key positions."""
    batch, n = hidden.shape[:2]
    past = key.shape[2] - n
    cos, sin = rope if batch == 1 else (t.expand(batch, -1, -1) for t in rope)
    wanted: tuple[Tensor, ...] = (hidden, cos, sin)
    if lse is not None:
        wanted += (lse.transpose(1, 2),)
    prompt = layout.prompt()  # no prompt row sees the candidates behind it
    newest = filled((batch, 1), key.shape[2] - 1, torch.int64, key.device)
    last = newest if prompt is None else last_rows(layout) + past
    old = past_validity(prefill.cache, attn.layer_idx, prefill.call.valid, past)
    key_mask = extend_validity(old, past, prompt, n)
    if needs.rows == "last" and prompt is None:
        wanted, rows = tuple(t[:, -1:] for t in wanted), newest
    elif needs.rows == "last":
        wanted = tuple(_pick(t, last - past) for t in wanted)
        # This one query stands for the last key position: what lies between it and the end is no prompt, and masked.
        rows = last = newest
        # nor is the last key position's rotation this query's
        cos, sin = (torch.cat([t[:, :-1], own], 1) for t, own in zip((cos, sin), wanted[1:3], strict=True))
    elif needs.rows == "text":
        assert prefill.unpruned is not None
        wanted = tuple(t[:, max(0, n - prefill.reach) :] for t in wanted)
        rows = _behind(past, prefill.unpruned.words_in(layout))
    else:
        order = counting(batch, n, hidden.device)
        rows = _behind(past, order if prompt is None else torch.where(prompt, order, -1))
    if needs.keys_only:
        wanted = tuple(t[:, :0] for t in wanted)
    query = rotate(_project(attn, "q", wanted[0], prefill.wants.normed), *wanted[1:3])
    return AttentionInputs(
        query=query,
        key=key,
        last=last,
        rows=rows,
        columns=_behind(past, layout.visual),
        key_mask=None if key_mask is None else key_mask.to(hidden.device),
        rope=(cos, sin),
        scale=attn.scaling,
        lse=None if lse is None else wanted[3].transpose(1, 2),
        group=_ranks(attn, query.shape[1], prefill.wants.heads),
    )


def _behind(past: int, rows: Tensor) -> Tensor:
    """Key positions of rows ``[B, N]`` (-1 = padding) that stand behind so many entries of the cache."""
    return rows if past == 0 else torch.where(rows >= 0, rows + past, -1)


def _ranks(attn: Any, have: int, every: int) -> Any:
    """The process group that shares ``every`` query head of a layer, of which ``have`` are here; None if all are.

    Raises ModelError where heads are missing and nothing says who has them: every rank would keep other tokens.
    """
    if have == every:
        return None
    weight = attn.q_proj.weight
    for dim, placement in enumerate(weight.placements if isinstance(weight, DTensor) else ()):
        if placement.is_shard(0):
            return weight.device_mesh.get_group(dim)
    raise ModelError(
        f"q_proj: expected all {every} heads, or a DTensor that says which ranks share them "
        f"(transformers' tensor parallelism), got {have} heads in a {type(weight).__name__}"
    )


def _project(attn: Any, name: str, hidden: Tensor, normed: bool) -> Tensor:
    """Query ("q") or key ("k") heads of rows entering a layer's attention, unrotated, behind its norm on them (Qwen3)."""
    x = heads(attribute(attn, f"{name}_proj")(hidden), attn.head_dim)
    return attribute(attn, f"{name}_norm")(x) if normed else x


def _keys(attn: Any, hidden: Tensor, rope: Rope, prefill: Prefill, past: int) -> Tensor:
    """Rotated keys of the rows entering a layer's attention, behind the ``past`` ones that its cache layer holds."""
    key, cache = rotate(_project(attn, "k", hidden, prefill.wants.normed), *rope), prefill.cache
    if cache is None or past == 0:
        return key
    return torch.cat([held_keys(cache.layers[attn.layer_idx], past, key.device), key], dim=2)


def _pick(x: Tensor, at: Tensor) -> Tensor:
    """Row ``at[b]`` of ``x [B, S, D]``, as ``[B, 1, D]``; any row of a sample that has none (a chunk of padding)."""
    return x.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
