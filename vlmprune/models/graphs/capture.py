"""Makes a graph of a prompt's prefill: inputs at addresses of their own, and a run of the text model on them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from vlmprune.constants import noting
from vlmprune.models.call import Call
from vlmprune.models.graphs.bindings import Bindings
from vlmprune.models.graphs.prompt_rows import PromptRows
from vlmprune.models.graphs.recorder import Recorder
from vlmprune.models.graphs.store import Graph, Inputs
from vlmprune.models.host.views import Encoded
from vlmprune.models.layout import open_bound
from vlmprune.models.prefill import RUNNING, Prefill, Unpruned, Wants
from vlmprune.models.prompt import Prompt
from vlmprune.models.stage import StageRunner
from vlmprune.models.text_span import TextSpan
from vlmprune.models.visuals import Notes, Visuals


class Subject(NamedTuple):
    """What is captured.

    Attributes:
        text: the text model; ``forward`` runs it.
        cache: its argument for the KV cache.
        wants: what the policy reads.
        also: other modules that its stages call.
    """

    text: Any
    forward: Callable[..., Any]
    cache: str
    wants: Wants
    also: tuple[nn.Module, ...] = ()


class Bucket(NamedTuple):
    """What is fixed in a graph.

    Attributes:
        length: rows L of every sample.
        words: room for the text after the last image, 0 if no stage reads it.
        note: what was noted of the vision tower's run, if stages read it.
    """

    length: int
    words: int
    note: Encoded | None


def capture(
    subject: Subject,
    runner: StageRunner | None,
    bucket: Bucket,
    prefill: Prefill,
    rows: PromptRows,
    prompt: Inputs,
    recorder: Recorder,
) -> Graph:
    """A graph for prompts like this one. ``runner`` runs its stages, on plans that belong to it.

    Raises:
        HostRead: a stage waits for the device, so its choice cannot be repeated.
    """
    unpruned = prefill.unpruned
    assert unpruned is not None
    device = prompt.embeds.device
    # no inference tensors: a later call may come from outside that mode
    with torch.inference_mode(False), torch.no_grad():
        inputs = _inputs_like(prompt, bucket.length)
    rows.fill(inputs, prompt)
    assert prefill.call.visuals is not None
    visuals = _of_graph(prefill.call.visuals, bucket.note, inputs.seen)
    batch, counts, seen = len(unpruned.layout.counts), unpruned.layout.counts, unpruned.seen

    def run() -> tuple[Prefill, Any]:
        cache = DynamicCache()
        call = Call(batch, bucket.length, cache=cache, visuals=visuals, visual=inputs.visual)
        text = None
        if inputs.text is not None:  # how far it reaches is not known: all rows are read
            text = TextSpan(inputs.text, (bucket.words,) * batch, bucket.length)
        layout = open_bound(inputs.visual, inputs.rows, counts)
        embeds = inputs.embeds if subject.wants.embeds else None
        first = Unpruned(layout, seen, None, text, embeds, unpruned.patches)
        inner = Prefill(
            subject.wants, call, Prompt(batch), unpruned=first, runner=runner, planes=inputs.planes
        )
        told = {subject.cache: cache, RUNNING: inner, "position_ids": _positions(inputs)}
        return inner, subject.forward(
            subject.text, inputs_embeds=inputs.embeds, attention_mask=None, use_cache=True, **told
        )

    bindings = Bindings(subject.text, *subject.also)
    with noting() as kept:
        (inner, output), recording = recorder.record(run, device)
    return Graph(inputs, inner, output, recording, bindings, kept)


def _inputs_like(prompt: Inputs, length: int) -> Inputs:
    """A graph's own, of zeros."""

    def room(x: Tensor) -> Tensor:
        return x.new_zeros(len(prompt.rows), length, *x.shape[2:])

    return Inputs(
        room(prompt.rows),
        room(prompt.embeds),
        room(prompt.visual),
        tuple(map(room, prompt.positions)),
        None if prompt.text is None else room(prompt.text),
        tuple(map(torch.zeros_like, prompt.planes)),
        tuple(map(torch.zeros_like, prompt.seen)),
    )


def _positions(inputs: Inputs) -> Tensor:
    """As the model is told them."""
    planes = inputs.positions
    return torch.stack(planes) if len(planes) > 1 else planes[0]


def parts_of(note: Encoded) -> tuple[Tensor, ...]:
    """The tensors of a note."""
    assert note.features is not None
    mask = () if note.mask is None else (note.mask,)
    return (*(note.taken[name] for name in sorted(note.taken)), note.features, *mask)


def _of_graph(visuals: Visuals, note: Encoded | None, seen: tuple[Tensor, ...]) -> Visuals:
    """The images of a call whose tower's run has left the graph's tensors; of its own a graph holds nothing."""
    if note is None:
        return Visuals(visuals.parts, visuals.kinds, [], Notes())
    names = sorted(note.taken)
    mask = None if note.mask is None else seen[-1]
    own = Encoded(note.crops, note.thw, mask, dict(zip(names, seen, strict=False)), seen[len(names)])
    notes, output = Notes(), SimpleNamespace(last_hidden_state=seen[len(names)])
    notes.add(output, own)
    return Visuals(visuals.parts, visuals.kinds, [output], notes)
