"""Frees the KV entries that layers before the last stage hold of tokens which did not survive it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlmprune.models.host.cache_view import entries, extend_validity, make_prunable, past_validity
from vlmprune.models.layout import Layout, moved, take
from vlmprune.models.prefill import Prefill


@torch.no_grad()
def compact_earlier(cache: Cache, prefill: Prefill, depth: int) -> None:
    """Let the layers before the last stage forget, too, what it dropped of the chunk that has just run.

    The chunk's own rows were computed with those entries; the tokens to come no longer see them.

    Raises:
        ModelError: a layer holds its entries in a form that cannot be taken apart (quantized).
    """
    call, final = prefill.call, prefill.layout(depth)
    for i in range(depth):
        if prefill.decision(i) is prefill.decision(depth):
            return
        layout = moved(prefill.layout(i), final.visual.device)
        stored = entries(cache, i, call.past + call.length)
        past = stored - layout.length
        old = past_validity(cache, i, call.valid, past)
        valid = extend_validity(old, past, final.valid, final.length)
        rows = _rows_of(final, layout, call.length)
        before = torch.arange(past, device=rows.device).expand(len(rows), -1)
        index = torch.cat([before, torch.where(rows >= 0, rows + past, -1)], dim=1)
        if cache.offloading:  # an offloaded layer comes back for this
            cache.prefetch_stream.synchronize()
            cache.layers[i].prefetch()
        make_prunable(cache, i).keep_entries(index, valid, stored)
        if cache.offloading:
            cache.layers[i].offload()


def _rows_of(later: Layout, earlier: Layout, q: int) -> Tensor:
    """``[B, n]`` where the rows of a later layout stood in an earlier one, -1 = padding."""
    assert later.origin is not None
    if earlier.origin is None:
        return later.origin
    batch, n = earlier.origin.shape
    order = torch.arange(n, device=earlier.origin.device).expand(batch, -1)
    spare = torch.where(earlier.origin >= 0, earlier.origin, q)
    where = order.new_full((batch, q + 1), -1).scatter(1, spare, order)
    return take(where[:, :q], later.origin)
