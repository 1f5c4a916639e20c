"""Frees the KV entries that layers before the last stage hold of tokens which did not survive it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from vlmprune.errors import ModelError
from vlmprune.models.host.cache_layers import QUANTIZED, keep_entries
from vlmprune.models.host.cache_view import (
    entries,
    extend_bias,
    extend_validity,
    make_prunable,
    past_validity,
    pruned_layer,
)
from vlmprune.models.layout import Layout, ascending, inverse, spread, take
from vlmprune.models.prefill import Decision, Prefill


@torch.no_grad()
def compact_earlier(cache: Cache, prefill: Prefill, depth: int) -> None:
    """Let the layers before the last stage forget, too, what it dropped of the chunk that has just run.

    The chunk's own rows were computed with those entries; the tokens to come no longer see them. Layers that must forget
    the same do so in one call.

    Raises:
        ModelError: a layer holds its entries in a form that cannot be taken apart (quantized). Nothing was changed.
    """
    seen, last = prefill.call.past + prefill.call.length, prefill.decision(depth)
    assert last is not None
    groups: dict[object, list[int]] = {}
    for i in range(depth):
        if (decided := prefill.decision(i)) is last:
            break
        layer, held = cache.layers[i], entries(cache, i, seen)
        if isinstance(layer, QUANTIZED):
            raise ModelError(
                "earlier_kv: expected 'full' with a quantized cache (its entries cannot be removed), got 'compact'"
            )
        alone = i if cache.offloading else None  # offloaded layers come back one at a time: more may not fit
        same = id(decided), held, isinstance(layer, StaticLayer), layer.keys.device, alone
        groups.setdefault(same, []).append(i)
    for members in groups.values():
        _compact(cache, prefill, last, members, entries(cache, members[0], seen))


def _compact(cache: Cache, prefill: Prefill, last: Decision, members: list[int], held: int) -> None:
    """Do it in layers that hold the same ``held`` entries in the same way."""
    layers, call, layout = [cache.layers[i] for i in members], prefill.call, prefill.layout(members[0])
    first, static = layers[0], isinstance(layers[0], StaticLayer)
    if cache.offloading:
        cache.prefetch_stream.synchronize()
    # not the layer that the next step begins with: it is back already, and stays
    away = cache.offloading and first.keys.device != first.device
    if away:
        first.prefetch()
    past = held - layout.length
    rows = _kept(layout, last.layout, past, call.length, first.keys.device)
    at = ascending(rows) if static else rows
    keep_entries(layers, at, static)
    new = None if last.layout.valid is None else at[:, past:] >= 0
    weights = None if last.weights is None else last.weights.to(at.device)
    # layers that knew the same share what they know now, and so the masks of decode steps
    shared: dict[object, tuple[Tensor | None, Tensor | None]] = {}
    for i in members:
        layer = pruned_layer(cache, i)
        known = None if layer is None else (id(layer.valid), id(layer.bias))
        if known not in shared:
            old = past_validity(cache, i, call.valid, past)
            bias = extend_bias(layer, past, weights, last.layout.length)
            if static and bias is not None:  # as the entries
                bias = spread(rows, bias, held).gather(1, at.clamp(min=0))
            shared[known] = extend_validity(old, past, new, last.layout.length), bias
        make_prunable(cache, i).forget(held - at.shape[1], *shared[known])
    if away:
        first.offload()


def _kept(layout: Layout, last: Layout, past: int, length: int, device: torch.device) -> Tensor:
    """``[B, n]`` key positions that stay in a layer of this layout, in the order of the last one's rows; -1 = padding."""
    assert last.origin is not None
    rows = last.origin.to(device)
    if layout.origin is not None:
        rows = take(inverse(layout.origin.to(device), length), rows)
    before = torch.arange(past, device=device).expand(len(rows), -1)
    return torch.cat([before, torch.where(rows >= 0, rows + past, -1)], dim=1)
