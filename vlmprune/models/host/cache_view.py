"""Questions about a KV cache some of whose layers may have been pruned: what they hold, and which of it is valid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from vlmprune.errors import ModelError
from vlmprune.models.host.cache_layers import PRUNED, QUANTIZED, PrunedLayer, lengthen


def check_cache(cache: object) -> None:
    """Raise ModelError unless every layer of the cache (None = no cache) can be shortened."""
    layers = [] if cache is None else cache.layers if isinstance(cache, Cache) else [cache]
    for layer in layers:
        if type(layer) not in PRUNED and not isinstance(layer, PrunedLayer):
            names = ", ".join(kind.__name__ for kind in PRUNED)
            raise ModelError(f"cache: expected layers of {names}, got {type(layer).__name__}")


def is_started(cache: Cache | None) -> bool:
    """Whether a cache has seen a call before."""
    layers: list[Any] = [] if cache is None else cache.layers
    # len(layers), not bool(layers): Dynamo of torch 2.11 cannot trace the latter
    return len(layers) > 0 and bool(layers[0].is_initialized)


def pruned_layer(cache: Cache | None, i: int) -> PrunedLayer | None:
    """Layer ``i`` of the cache if pruning has shortened it before, else None."""
    if cache is None or i >= len(cache.layers):
        return None
    layer = cache.layers[i]
    return layer if isinstance(layer, PrunedLayer) else None


def layer_at(cache: Cache, i: int) -> Any:
    """Layer ``i`` of a cache, which may grow by layers."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= i:
            cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[i]


def make_prunable(cache: Cache, i: int) -> PrunedLayer:
    """Layer ``i`` of a cache that ``check_cache`` let pass, able to count what it has seen."""
    layer = layer_at(cache, i)
    if not isinstance(layer, PrunedLayer):
        layer.__class__ = PRUNED[type(layer)]
    pruned: PrunedLayer = layer
    return pruned


def entries(cache: Cache | None, i: int, seen: int) -> int:
    """Entries layer ``i`` holds when the cache has seen that many tokens; known on the host for every kind."""
    layer = pruned_layer(cache, i)
    return seen if layer is None else seen - layer.dropped


def held_keys(layer: Any, count: int, device: torch.device) -> Tensor:
    """The first ``count`` keys ``[B, Hkv, count, D]`` of a cache layer of any kind, wherever and however it keeps them."""
    return _held(layer, "keys", count, device)


def held_values(layer: Any, count: int, device: torch.device) -> Tensor:
    """The same of its values."""
    return _held(layer, "values", count, device)


def _held(layer: Any, name: str, count: int, device: torch.device) -> Tensor:
    some: Tensor = getattr(layer, name)
    if isinstance(layer, QUANTIZED):
        old = layer._dequantize(getattr(layer, f"_quantized_{name}"))
        some = torch.cat([old, *([some] if some.numel() else [])], dim=2)
    some = some if some.shape[2] == count else some[:, :, :count]
    return some.to(device)


def resident_bytes(cache: Cache | None) -> int:
    """Bytes of all storage the layers of a cache hold, allocated but unwritten entries included."""
    held: list[Any] = []
    for layer in () if cache is None else cache.layers:
        if isinstance(layer, CacheLayerMixin):
            held += [layer.keys, layer.values]
        if isinstance(layer, QUANTIZED):
            held += [layer._quantized_keys, layer._quantized_values]
    return sum(map(_bytes, held))


def _bytes(held: Any) -> int:
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):  # a tensor made of tensors
            return sum(_bytes(getattr(held, name)) for name in held.__tensor_flatten__()[0])
        return held.untyped_storage().nbytes()
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, tuple | list) else ()
    return sum(map(_bytes, parts))


def past_validity(cache: Cache | None, i: int, seen: Tensor | None, count: int) -> Tensor | None:
    """Validity ``[B, count]`` of the first entries layer ``i`` holds, or None if all of them are valid.

    A layer that was never pruned holds every token seen, so the attention mask ``seen [B, past + q]`` tells.
    """
    layer = pruned_layer(cache, i)
    known = seen if layer is None else layer.valid
    return None if known is None or count == 0 else lengthen(known, count)


def extend_validity(old: Tensor | None, past: int, new: Tensor | None, rows: int) -> Tensor | None:
    """Validity ``[B, past + rows]`` of a past and a new chunk; None where both are all valid."""
    if old is None and new is None:
        return None
    some = new if new is not None else old
    assert some is not None
    batch, device = some.shape[0], some.device
    old = torch.ones(batch, past, dtype=torch.bool, device=device) if old is None else old.to(device)
    new = torch.ones(batch, rows, dtype=torch.bool, device=device) if new is None else new
    return torch.cat([old, new], dim=1)


def extend_bias(layer: PrunedLayer | None, past: int, weights: Tensor | None, rows: int) -> Tensor | None:
    """What is added to the logits of ``past`` entries of a layer and of ``rows`` new ones, ``[B, past + rows]``; None = nothing.

    To those of a row that stands for so many tokens, ``weights [B, rows]``, their log is (None = each for itself).
    """
    old = None if layer is None else layer.bias
    if weights is not None:
        new = weights.log()
        old = new.new_zeros(len(new), past) if old is None else lengthen(old.to(new.device), past, 0.0)
        return torch.cat([old, new], dim=1)
    return None if old is None else lengthen(lengthen(old, past, 0.0), past + rows, 0.0)
