"""What a layer with a pruned cache gets beside its rows: a mask of its own length, rotary tables of packed positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from vlmprune.models.forward import Forward, Plan, Rope
from vlmprune.models.kv_cache import entries, extend_validity, make_prunable, past_validity
from vlmprune.models.kv_layers import Length, PrunedLayer
from vlmprune.register import NAME

Kwargs = dict[str, Any]


def chunk_mask(config: Any, forward: Forward, plan: Plan | None, hidden: Tensor, i: int) -> Any:
    """The mask of a chunk's rows ``hidden [B, n, D]`` at decoder layer ``i``; its cache is told of them.

    Layers that need the same mask share it.
    """
    cache, rows = forward.cache, hidden.shape[1]
    past = entries(cache, i, forward.past)
    old = past_validity(cache, i, forward.seen, past)
    layer = None if cache is None else make_prunable(cache, i)
    known = (None, None) if layer is None else (layer.valid, layer.shift)
    key = (past, id(plan), *map(id, known))
    if key not in forward.masks:
        new = forward.chunk_padding() if plan is None else plan.layout.valid
        valid = extend_validity(old, past, new, rows)
        mask = pruned_mask(config, hidden, valid, past, layer, left=plan is not None)
        shift = add_shift(known[1], None if plan is None else plan.shift, hidden.device)
        forward.masks[key] = (mask, valid, shift, known)  # known: kept alive, so that its ids stay its own
    mask, valid, shift, _ = forward.masks[key]
    if layer is not None:
        layer.announce(valid, forward.q - rows, shift)
    return mask


def decode_step(
    text: Any, forward: Forward, layer: PrunedLayer, hidden: Tensor, kwargs: Kwargs
) -> Kwargs | None:
    """What a pruned layer needs for one new token ``hidden [B, 1, D]``, or None if it can run as it is.

    Reads nothing but the cache layer. With neither holes nor packed positions that is no work at all: one new row
    sees everything, in any attention implementation, when there is no mask.
    """
    if layer.valid is None and layer.shift is None and not layer.static:
        return None if kwargs["attention_mask"] is None else {**kwargs, "attention_mask": None}
    rope = kwargs["position_embeddings"]
    if layer.shift is not None:
        rope = shifted(text, forward, hidden, kwargs["position_ids"], layer.shift)
    layer.admit()
    mask = _step_mask(text.config, forward, layer, hidden)
    # position_ids: FlashAttention reads gaps in them as packed sequences
    return {**kwargs, "position_embeddings": rope, "position_ids": None, "attention_mask": mask}


def _step_mask(config: Any, forward: Forward, layer: PrunedLayer, hidden: Tensor) -> Any:
    """The mask of one new token; layers that need the same share it, but for a static cache's.

    Its step is compiled, and there is no Python number to tell its masks apart by.
    """
    stored = layer.stored()
    if layer.static:
        return pruned_mask(config, hidden, layer.valid, stored, layer)
    if layer.valid is None:
        return None
    key = (stored, id(layer.valid))
    if key not in forward.masks:
        forward.masks[key] = pruned_mask(config, hidden, layer.valid, stored, layer)
    return forward.masks[key]


def pruned_mask(
    config: Any,
    hidden: Tensor,
    valid: Tensor | None,
    past: Length,
    layer: PrunedLayer | None,
    left: bool = False,
) -> Any:
    """The causal mask in the format of the attention implementation (None where it needs none).

    Args:
        config: the text model's configuration, which names the implementation.
        hidden: ``[B, n, D]`` rows entering the layer.
        valid: bool ``[B, P]`` for the first keys, those after them are valid; None = all are.
        past: entries the cache layer holds already.
        layer: the cache layer, or None without a cache.
        left: every sample's padding among the rows is known to stand on their left, as a stage leaves it.
    """
    batch, rows = hidden.shape[:2]
    build = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if build is None:  # as transformers has it for implementations without a mask function
        return None
    static = layer is not None and layer.static
    valid = None if valid is None else valid.to(hidden.device)
    return build(
        batch_size=batch,
        q_length=rows,
        kv_length=rows if layer is None else layer.get_mask_sizes(rows)[0],
        q_offset=past,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=valid if layer is None else layer.key_mask(valid, past, hidden),
        # Leaving the mask out is only asked for where no value has to be read from the device to decide it.
        allow_is_causal_skip=valid is None and not (static and rows == 1),
        dtype=hidden.dtype,
        config=config,
        use_vmap=False,
        device=hidden.device,
        **({"left_padded": True} if left and config._attn_implementation == NAME else {}),
    )


def shifted(text: Any, forward: Forward, hidden: Tensor, position_ids: Tensor, shift: Tensor) -> Rope:
    """Rotary tables of a chunk after a packed cache; layers with the same shift share them."""
    for known, tables in forward.ropes:
        if known is shift:
            return tables
    tables = text.rotary_emb(hidden, position_ids - shift.to(position_ids.device))
    forward.ropes.append((shift, tables))
    return tables


def add_shift(old: Tensor | None, more: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    """By how much positions lie below the number of tokens seen, ``[B, 1]``, when a chunk packs some more."""
    if more is None or not any(more):
        return old
    new = torch.tensor(more).to(device, non_blocking=True)[:, None]
    return new if old is None else old + new
