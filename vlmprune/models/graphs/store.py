"""The graphs that are kept: the latest, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.models.graphs.bindings import Bindings
from vlmprune.models.graphs.recorder import CudaGraphs, Recorder, Recording
from vlmprune.models.prefill import Prefill

SHAPES = 1024
"""Shapes remembered for having come once, or for why they have no graph."""


class Inputs(NamedTuple):
    """What a prefill reads. A graph's own are at addresses that stay, its L rows those of every sample from the left.

    Attributes:
        rows: ``[B, L]`` int64 position in the prompt of each row, -1 = padding behind a sample, where the others have zeros.
        embeds: ``[B, L, D]`` input embeddings.
        visual: ``[B, L]`` bool, True at visual tokens.
        positions: planes ``[B, L]`` of what the model is told as positions.
        text: ``[B, L]`` bool, the text after the last image; None = no stage reads it.
        planes: ``[M, D]`` each, what is added to visual tokens behind the first layers (Qwen3-VL).
        seen: what stages read of the vision tower.
    """

    rows: Tensor
    embeds: Tensor
    visual: Tensor
    positions: tuple[Tensor, ...] = ()
    text: Tensor | None = None
    planes: tuple[Tensor, ...] = ()
    seen: tuple[Tensor, ...] = ()

    def by_row(self) -> list[Tensor]:
        """Those with a row for each of the prompt's positions."""
        text = () if self.text is None else (self.text,)
        return [self.embeds, self.visual, *self.positions, *text]

    def whole(self) -> list[Tensor]:
        """Those that are the same in the prompt's rows and in a graph's."""
        return [*self.planes, *self.seen]

    def every(self) -> list[Tensor]:
        """All of them."""
        return [self.rows, *self.by_row(), *self.whole()]


@dataclass(eq=False)
class Graph:
    """One captured prefill: what it reads, and what it leaves in ``prefill`` (its cache included) and ``output``.

    Attributes:
        kept: tensors made once for many prefills that it reads as well.
    """

    inputs: Inputs
    prefill: Prefill
    output: Any
    recording: Recording
    bindings: Bindings
    kept: list[Tensor]

    @property
    def cache_layers(self) -> list[Any]:
        """Keys and values that a replay leaves."""
        layers: list[Any] = self.prefill.call.cache.layers
        return layers

    @property
    def nbytes(self) -> int:
        """Device memory that it holds: what the recording does, its inputs, and what its stages work in."""
        runner = self.prefill.runner
        workspaces = 0 if runner is None else runner.passes.plans.nbytes()
        return self.recording.nbytes + workspaces + sum(x.nbytes for x in self.inputs.every())


class Graphs:
    """Captured prefills, for ``prune(model, policy, graphs=...)`` and ``meter``; they outlive the scope.

    Prompts of the same images whose text is about as long share one (``vlmprune.models.graphs.buckets``). The first prompt
    of its kind runs as ever, the second is captured (``warmup`` does so beforehand). Those used longest ago go where there
    is no room. One ``Graphs`` may serve several models, policies and threads; it holds on to those models until ``clear``.

    Args:
        memory: bytes of device memory that all graphs together may hold.
        most: how many are kept.
        recorder: what captures.

    Raises:
        InputError: a bound that is no positive number.

    Example, on a machine without a GPU:
        >>> from vlmprune import FastV, Graphs, prune
        >>> with prune(model, FastV(keep=4), graphs=Graphs()) as run:
        ...     output = model.generate(**inputs, max_new_tokens=4)
        >>> run.report().graph
        'plain: no GPU'
    """

    def __init__(self, memory: int = 4 << 30, most: int = 64, recorder: Recorder | None = None) -> None:
        for name, number in (("memory", memory), ("most", most)):
            ok = isinstance(number, int) and not isinstance(number, bool) and number > 0
            check(ok, name, "a whole number > 0", repr(number))
        self.memory, self.most, self.recorder = memory, most, recorder or CudaGraphs()
        self.lock = RLock()
        self._kept: OrderedDict[Any, Graph] = OrderedDict()
        self._shapes: OrderedDict[Any, str] = OrderedDict()

    def __reduce__(self) -> Any:
        return Graphs, (self.memory, self.most, self.recorder)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes that all graphs hold."""
        return sum(graph.nbytes for graph in self._kept.values())

    @classmethod
    def refusal(cls, device: torch.device) -> str | None:
        """Why CUDA graphs cannot run on a device; None if they can."""
        return CudaGraphs().refusal(device)

    def clear(self) -> None:
        """Let all graphs go, and forget what was known of shapes."""
        with self.lock:
            self._kept.clear()
            self._shapes.clear()

    # For the path that runs them, which holds the lock.

    def find(self, key: Any) -> Graph | None:
        """The graph of this key, as the latest used. One whose model has changed since is dropped."""
        graph = self._kept.get(key)
        if graph is not None and not graph.bindings.hold():
            del self._kept[key]
            graph = None
        if graph is not None:
            self._kept.move_to_end(key)
        return graph

    def why_not(self, key: Any) -> str | None:
        """Why no graph is to be made for this key now; None where one is."""
        if key in self._shapes:
            self._shapes.move_to_end(key)
            return self._shapes[key] or None
        self.refuse(key, "")
        return "the first prompt of its shape"

    def refuse(self, key: Any, why: str) -> None:
        """Remember why this key has no graph; "" = it has come, and may have one the next time."""
        self._shapes[key] = why
        if len(self._shapes) > SHAPES:
            self._shapes.popitem(last=False)

    def keep(self, key: Any, graph: Graph) -> str | None:
        """Keep a graph, and let others go for it. Returns why it is not kept, if it is larger than all may be."""
        if graph.nbytes > self.memory:
            return (
                f"memory short: one graph of {graph.nbytes >> 20} MiB, where all may hold {self.memory >> 20}"
            )
        self._kept[key] = graph
        while len(self._kept) > self.most or self.nbytes > self.memory:
            self._kept.popitem(last=False)
        return None
