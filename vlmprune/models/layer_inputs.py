"""What a layer with a pruned cache gets beside its rows: a mask of its own length, rotary tables of packed positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune.constants import whole_numbers
from vlmprune.errors import ModelError
from vlmprune.models.host.cache_layers import PrunedLayer
from vlmprune.models.host.cache_view import (
    entries,
    extend_bias,
    extend_validity,
    make_prunable,
    past_validity,
    pruned_layer,
)
from vlmprune.models.host.masks import pruned_mask
from vlmprune.models.host.parts import Parts
from vlmprune.models.prefill import Decision, Prefill, Rope

Kwargs = dict[str, Any]


def chunk_mask(config: Any, prefill: Prefill, decided: Decision | None, hidden: Tensor, i: int) -> Any:
    """The mask of a chunk's rows ``hidden [B, n, D]`` at decoder layer ``i``; its cache is told of them.

    Layers that need the same mask share it.
    """
    cache, rows = prefill.cache, hidden.shape[1]
    past = entries(cache, i, prefill.call.past)
    old = past_validity(cache, i, prefill.call.valid, past)  # before the layer becomes one that tells
    layer = None if cache is None else make_prunable(cache, i)
    known = _known(layer)
    key = (past, id(decided), *map(id, known))
    if key not in prefill.masks:
        told = _told(prefill, decided, old, past, layer, rows, hidden.device)
        short = decided is not None and decided.layout.origin is not None  # its padding is on the left
        mask = pruned_mask(config, hidden, told[0], past, layer, left=short, bias=told[3])
        prefill.masks[key] = (mask, told, known)  # known: kept alive, so that its ids stay its own
    mask, told, _ = prefill.masks[key]
    if layer is not None:
        layer.announce(*told)
    return mask


def first_wave_mask(config: Any, prefill: Prefill, decided: Decision, hidden: Tensor, i: int) -> Any:
    """That of a first wave's rows ``hidden [B, n, D]``. The cache layer is told nothing yet: ``Waves`` holds them."""
    past, layer = entries(prefill.cache, i, prefill.call.past), pruned_layer(prefill.cache, i)
    known = _known(layer)
    if known[2] is not None:
        raise ModelError(
            "cache: expected one in which no token stands for others (rectify=True) with a second wave"
        )
    key = ("first wave", past, id(known[0]))
    if key not in prefill.masks:
        old = past_validity(prefill.cache, i, prefill.call.valid, past)
        valid = extend_validity(old, past, decided.layout.valid, hidden.shape[1])
        mask = pruned_mask(config, hidden, valid, past, None, left=True)
        prefill.masks[key] = (mask, known)
    return prefill.masks[key][0]


def wave_mask(config: Any, prefill: Prefill, decided: Decision, hidden: Tensor, i: int, rows: Tensor) -> Any:
    """That of a second wave's rows ``hidden [B, w, D]``, which are ``rows [B, w]`` of the decision's (-1 = padding).

    The cache layer is told of all rows of the decision.
    """
    cache, length = prefill.cache, decided.layout.length
    past = entries(cache, i, prefill.call.past)
    old = past_validity(cache, i, prefill.call.valid, past)  # before the layer becomes one that tells
    layer = None if cache is None else make_prunable(cache, i)
    known = _known(layer)
    key = ("second wave", past, *map(id, known))
    if key not in prefill.masks:
        told = _told(prefill, decided, old, past, layer, length, hidden.device)
        order = torch.arange(length, device=rows.device)
        # padding sees everything: it counts nowhere, and a row that sees nothing is not a number
        seen = order <= torch.where(rows < 0, length, rows)[..., None]
        shown = pad(seen, (past, 0), value=True)
        if told[0] is not None:
            shown = shown & told[0][:, None].to(shown.device)
        prefill.masks[key] = (pruned_mask(config, hidden, None, past, layer, shown=shown), told, known)
    mask, told, _ = prefill.masks[key]
    if layer is not None:
        layer.announce(*told)
    return mask


def _known(layer: PrunedLayer | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Validity, shift and bias of what a cache layer holds."""
    return (None, None, None) if layer is None else (layer.valid, layer.shift, layer.bias)


def _told(
    prefill: Prefill,
    decided: Decision | None,
    old: Tensor | None,
    past: int,
    layer: PrunedLayer | None,
    rows: int,
    device: torch.device,
) -> tuple[Tensor | None, int, Tensor | None, Tensor | None]:
    """What a cache layer is told of a chunk's ``rows`` behind its ``past`` entries of validity ``old``, as ``announce`` takes it."""
    call = prefill.call
    new = call.padding() if decided is None else decided.layout.valid
    # Padding behind every row that matters needs no mask: causality hides it.
    valid = extend_validity(old, past, None if prefill.bound else new, rows)
    bias = extend_bias(layer, past, None if decided is None else decided.weights, rows)
    shift = add_shift(
        None if layer is None else layer.shift, None if decided is None else decided.shift, device
    )
    return valid, call.length - rows, shift, bias


def decode_step(
    parts: Parts, prefill: Prefill, layer: PrunedLayer, hidden: Tensor, kwargs: Kwargs
) -> Kwargs | None:
    """What a pruned layer needs for one new token ``hidden [B, 1, D]``, or None if it can run as it is.

    Reads nothing but the cache layer. With neither holes nor packed positions nor a bias that is no work at all: one new row
    sees everything, in any attention implementation, when there is no mask.
    """
    told, config = parts.host.told, parts.text.config
    if layer.valid is None and layer.shift is None and layer.bias is None and not layer.static:
        return None if told(kwargs, "attention_mask") is None else {**kwargs, "attention_mask": None}
    rope = told(kwargs, "position_embeddings")
    if layer.shift is not None:
        rope = shifted(parts.text, prefill, hidden, told(kwargs, "position_ids"), layer.shift)
    layer.admit()
    mask, stored = None, layer.stored()
    if layer.static:  # its step is compiled, and there is no Python number to tell its masks apart by
        mask = pruned_mask(config, hidden, layer.valid, stored, layer, bias=layer.bias)
    elif layer.valid is not None or layer.bias is not None:  # layers that need the same mask share it
        key = (stored, id(layer.valid), id(layer.bias))
        if key not in prefill.masks:
            prefill.masks[key] = pruned_mask(config, hidden, layer.valid, stored, layer, bias=layer.bias)
        mask = prefill.masks[key]
    # position_ids: FlashAttention reads gaps in them as packed sequences
    return {**kwargs, "position_embeddings": rope, "position_ids": None, "attention_mask": mask}


def shifted(text: Any, prefill: Prefill, hidden: Tensor, position_ids: Tensor, shift: Tensor) -> Rope:
    """Rotary tables of a chunk after a packed cache; layers with the same shift share them."""
    for known, tables in prefill.ropes:
        if known is shift:
            return tables
    tables = text.rotary_emb(hidden, places_of(position_ids, shift))
    prefill.ropes.append((shift, tables))
    return tables


def places_of(position_ids: Tensor, shift: Tensor | None) -> Tensor:
    """The rotary positions of a chunk behind a cache whose positions lie lower by ``shift [B, 1]``; None = they do not."""
    return position_ids if shift is None else position_ids - shift.to(position_ids.device)


def add_shift(old: Tensor | None, more: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    """By how much positions lie below the number of tokens seen, ``[B, 1]``, when a chunk packs some more."""
    if more is None or not any(more):
        return old
    new = whole_numbers(more, device)[:, None]
    return new if old is None else old + new
