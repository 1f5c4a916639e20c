"""What a replay has left, given to the caller: hidden states, the cache's layers at their true length, what was kept."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache

from vlmprune import ops
from vlmprune.models.graphs.prompt_rows import PromptRows
from vlmprune.models.graphs.store import Graph
from vlmprune.models.host.cache_layers import AT_ONCE, fill
from vlmprune.models.host.cache_view import layer_at, make_prunable
from vlmprune.models.layer_inputs import add_shift
from vlmprune.models.prefill import Decision, Prefill


def hand_over(graph: Graph, prefill: Prefill, rows: PromptRows, cache: Cache | None) -> Tensor:
    """Make a prefill what it would be had it run itself; all is copied, as the next replay writes over it.

    Args:
        graph: which was replayed.
        prefill: for this one.
        rows: where its rows are.
        cache: what gets the keys and values; None = nothing does.

    Returns:
        The final hidden states ``[B, n, D]``.
    """
    index = _decide(graph, prefill, rows)
    if cache is not None:
        _fill_cache(graph, prefill, cache, index)
    return ops.gather_tokens([graph.output.last_hidden_state], index[-1])[0]


def _decide(graph: Graph, prefill: Prefill, rows: PromptRows) -> list[Tensor]:
    """Enter the graph's decisions; returns for every layer, and for what comes behind the last, which rows are the prompt's."""
    made, prompt, depth = graph.prefill, prefill.prompt, len(graph.cache_layers)
    assert prefill.unpruned is not None and prompt is not None and made.prompt is not None
    layout, at, index = prefill.unpruned.layout, rows.unpruned(), []
    for i in range(depth):
        if i in made.decisions:
            record, decided, before = made.prompt.stages[i], made.decisions[i], layout
            prefill.decisions[i] = None
            if decided is not None:
                layout, at = rows.shortened(layout, decided.layout)
                prefill.decisions[i] = Decision(layout, at, decided.rope, decided.shift)
            numbers = record.chunks[0].numbers
            prompt.record(i, before, None if numbers is None else numbers.clone(), layout, record.path)
        index.append(at)
    return [*index, at]


def _fill_cache(graph: Graph, prefill: Prefill, cache: Cache, index: list[Tensor]) -> None:
    """Give the call's cache the entries that a layer's rows have left; layers with the same rows in one launch."""
    layers, start = graph.cache_layers, 0
    while start < len(layers):
        end = start + 1
        while end < len(layers) and end - start < AT_ONCE and index[end] is index[start]:
            end += 1
        held = [x for layer in layers[start:end] for x in (layer.keys, layer.values)]
        entries = ops.gather_tokens(held, index[start])
        decided = prefill.decision(start)
        shift = None if decided is None else add_shift(None, decided.shift, entries[0].device)
        for i in range(start, end):
            layer = layer_at(cache, i)
            if decided is not None:
                layer = make_prunable(cache, i)
                layer.announce(decided.layout.valid, prefill.call.length - decided.layout.length, shift)
            fill(layer, *entries[2 * (i - start) : 2 * (i - start) + 2])
        start = end
