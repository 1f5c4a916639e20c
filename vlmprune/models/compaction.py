"""Frees the KV entries that layers before the last stage hold of tokens which did not survive it."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from vlmprune.models.host.cache_view import entries, extend_validity, make_prunable, past_validity
from vlmprune.models.layout import inverse, moved, take
from vlmprune.models.prefill import Prefill


@torch.no_grad()
def compact_earlier(cache: Cache, prefill: Prefill, depth: int) -> None:
    """Let the layers before the last stage forget, too, what it dropped of the chunk that has just run.

    The chunk's own rows were computed with those entries; the tokens to come no longer see them.

    Raises:
        ModelError: a layer holds its entries in a form that cannot be taken apart (quantized).
    """
    call, final = prefill.call, prefill.layout(depth)
    assert final.origin is not None
    for i in range(depth):
        if prefill.decision(i) is prefill.decision(depth):
            return
        layout = moved(prefill.layout(i), final.visual.device)
        stored = entries(cache, i, call.past + call.length)
        past = stored - layout.length
        old = past_validity(cache, i, call.valid, past)
        valid = extend_validity(old, past, final.valid, final.length)
        rows = final.origin
        if layout.origin is not None:
            rows = take(inverse(layout.origin, call.length), rows)
        before = torch.arange(past, device=rows.device).expand(len(rows), -1)
        at = torch.cat([before, torch.where(rows >= 0, rows + past, -1)], dim=1)
        if cache.offloading:  # an offloaded layer comes back for this
            cache.prefetch_stream.synchronize()
            cache.layers[i].prefetch()
        make_prunable(cache, i).keep_entries(at, valid, stored)
        if cache.offloading:
            cache.layers[i].offload()
