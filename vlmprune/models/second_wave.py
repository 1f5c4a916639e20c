"""Runs a second wave: which rows are its own, what they see, and the layers over them (``models/waves.py`` says what for)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.models.host.parts import Parts
from vlmprune.models.layer_inputs import Kwargs, wave_mask
from vlmprune.models.layout import Layout, inverse, moved, put, spread, take, where_true
from vlmprune.models.prefill import Decision, Prefill
from vlmprune.models.prompt import SecondWave


class Joining(NamedTuple):
    """The rows of a second wave.

    Attributes:
        rows: ``[B, w]`` which rows of the sequence behind the stage they are, -1 = padding on the right.
        layout: their own.
        order: ``[B, n]`` the rows behind the stage, as ``Waves.order`` has them.
    """

    rows: Tensor
    layout: Layout
    order: Tensor


def run_second_wave(parts: Parts, prefill: Prefill, hidden: Tensor, kwargs: Kwargs) -> Tensor:
    """The rows ``hidden [B, n, D]`` behind the stage, with those of the second wave as the layers before it give them.

    ``kwargs`` are those of the stage's layer, whose decision has been made. From then on it is that of the layers before, too.
    """
    last, waves = prefill.wants.wave_layer, prefill.waves
    decided = prefill.decision(last)
    assert waves is not None and decided is not None
    joining = join(prefill, decided)
    at = take(_origin(decided.layout), joining.rows)
    rows = ops.gather_tokens([waves.inputs.to(hidden.device)], at)[0]
    cos, sin = ops.gather_tokens([*decided.rope], joining.rows)
    prefill.decisions = dict.fromkeys(prefill.decisions, decided)
    waves.order = joining.order
    given = {**kwargs, "position_ids": None, "position_embeddings": (cos, sin), parts.host.cache: waves}
    for i, layer in enumerate(parts.layers[:last]):
        rows = prefill.deepened(i, rows, joining.layout)
        given["attention_mask"] = wave_mask(parts.text.config, prefill, decided, rows, i, joining.rows)
        rows = layer(rows, **given)
    prefill.waves = None
    if prefill.prompt is not None:
        real, keys = joining.layout.real, hidden.shape[1]
        prefill.prompt.second_wave = SecondWave(last, real, rows.shape[1], keys)
    return put(hidden, joining.rows, prefill.deepened(last, rows, joining.layout).to(hidden.device))


def join(prefill: Prefill, decided: Decision) -> Joining:
    """Which rows of the sequence behind the stage the second wave runs: those that come back, and those behind the last image."""
    assert prefill.unpruned is not None
    layout, device = decided.layout, decided.layout.visual.device
    first, one = moved(prefill.unpruned.layout, device), moved(prefill.layout(0), device)
    q, visual, origin = first.length, first.visual, _origin(layout)
    newest = visual.amax(1, keepdim=True)
    order = torch.arange(q, device=device)
    ran_at = spread(_origin(one), torch.ones_like(_origin(one), dtype=torch.bool), q)
    ran = ran_at & ((order <= newest) | (newest < 0))
    second = (origin >= 0) & ~ran.gather(1, origin.clamp(min=0))
    new = tuple(b - a for a, b in zip(one.counts, layout.counts, strict=True))
    again = _behind(prefill, newest, q)
    real = tuple(map(sum, zip(new, again, strict=True)))
    rows = where_true(second, max(real))
    at = take(origin, rows)
    numbers = take(inverse(visual, q), at)
    own = where_true(numbers >= 0, max(new))
    layout_two = Layout(
        length=rows.shape[1],
        visual=own,
        counts=new,
        real=real,
        valid=None if min(real) == max(real) else rows >= 0,
        origin=at,
        before=(first, take(numbers, own)),
    )
    place = take(inverse(_origin(one), q), origin)
    later = inverse(rows, layout.length)
    return Joining(rows, layout_two, torch.where(later >= 0, later + one.length, place))


def _behind(prefill: Prefill, newest: Tensor, q: int) -> tuple[int, ...]:
    """How many rows of each sample stand behind its last image, candidates of assisted decoding too: then one host read."""
    unpruned = prefill.unpruned
    assert unpruned is not None and unpruned.text is not None
    if unpruned.layout.end is None:
        return unpruned.text.words
    behind = (torch.arange(q, device=newest.device) > newest) & (newest >= 0)
    valid = prefill.call.padding()
    return tuple((behind if valid is None else behind & valid.to(behind.device)).sum(1).tolist())


def _origin(layout: Layout) -> Tensor:
    """``[B, n]`` the position of each row in the prompt before any pruning, -1 = padding."""
    if layout.origin is not None:
        return layout.origin
    order = torch.arange(layout.length, device=layout.visual.device).expand(len(layout.counts), -1)
    return order if layout.valid is None else torch.where(layout.valid, order, -1)
