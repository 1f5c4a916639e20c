"""How long vision, prefill, selection and decode take: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from vlmprune.models.host.parts import Parts
from vlmprune.models.per_thread import PerThread
from vlmprune.models.ranges import begin, end

Mark = Any  # a float (seconds), a recorded torch.cuda.Event, or None while a CUDA graph is captured


@dataclass(frozen=True)
class Seconds:
    """Durations of the latest generation, in seconds. ``selection`` is part of ``prefill``; 0.0 = did not happen, or was
    captured in a CUDA graph.

    Attributes:
        vision: vision tower and projector.
        prefill: decoder over the prompt, language-model head included.
        selection: scoring, selecting and gathering, all stages together.
        decode: from the start of the first decode step to the end of the last one.
        second_wave: the layers that tokens which came back have run (``Needs(wave=True)``); part of ``prefill``.
    """

    vision: float
    prefill: float
    selection: float
    decode: float
    second_wave: float = 0.0


class Marks:
    """When the parts of one prefill, and of the decoding after it, began and ended.

    Read out only when asked, so timing never makes the host wait. ``vision`` may have begun before the prefill.
    """

    def __init__(self, vision: Sequence[Mark] = ()) -> None:
        self.vision = vision
        self.prefill: list[Mark] = []
        self.decode: list[Mark] = []
        self.chosen: list[list[Mark]] = []
        self.waves: list[list[Mark]] = []
        self.latest, self.steps, self.more = self.prefill, 0, False

    def step_starts(self, mark: Mark) -> None:
        """The decoder begins a prompt chunk (the first one, or ``more`` of the prompt) or a decode step."""
        if self.prefill and not self.more:
            self.latest, self.steps = self.decode, self.steps + 1
        self.more = False
        if not self.latest:
            self.latest.append(mark)

    def step_ends(self, mark: Mark) -> None:
        """It is done; the text model says so first, then the language-modeling head."""
        if self.latest:
            self.latest[1:] = [mark]

    def seconds(self) -> Seconds:
        """Read the marks out; on a GPU this waits for the work they mark."""
        selection = sum(map(_length, self.chosen))
        waves = sum(map(_length, self.waves))
        return Seconds(_length(self.vision), _length(self.prefill), selection, _length(self.decode), waves)


class _Selecting:
    """A context manager of few steps, as every stage enters two.

    The time is that of the prompt under way when it began: a compensator may run the same model inside, whose prompts are
    others. A thread that only replays layers (backward, on a GPU) has none.
    """

    def __init__(self, clock: Clock, layer: int) -> None:
        self.clock, self.start, self.range = clock, clock.now(), begin("selection, layer %d", layer)
        self.marks = clock.mine.marks

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.marks is not None:
            self.marks.chosen.append([self.start, self.clock.now()])
        end(self.range)


class Clock:
    """Makes the marks, from hooks. Every thread times the prompt it runs.

    Hooks are methods and no closures: a copied model's hooks must belong to the copy. In compiled code they do nothing: a
    compiled step is one graph, and a clock is no part of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mine = PerThread(vision=(), marks=None, encoding=None, running=None)

    def begin(self) -> Marks:
        """This thread starts a prompt: the marks to come are its own."""
        self.mine.marks = marks = Marks(self.mine.vision)
        return marks

    def go_on(self, marks: Marks) -> None:
        """This thread's coming step is another chunk of a prompt."""
        self.mine.marks, marks.more = marks, True

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A block whose work is no part of the prompt: runs to warm up a capture, and the capture."""
        mine, self.mine.marks = self.mine.marks, Marks()
        try:
            yield
        finally:
            self.mine.marks = mine

    def now(self) -> Mark:
        """A mark in the stream of work, or the time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None  # nothing runs yet, and the replays are not ours
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def register(self, parts: Parts) -> list[RemovableHandle]:
        """Hook the modules whose work is timed."""
        return [
            parts.vision.register_forward_pre_hook(self._vision_starts),
            parts.projector.register_forward_hook(self._vision_ends),
            parts.text.register_forward_pre_hook(self._step_starts),
            parts.text.register_forward_hook(self._step_ends),
            parts.model.register_forward_hook(self._step_ends),
        ]

    def selection(self, layer: int) -> _Selecting:
        """Time a piece of selection work for the stage at ``layer``, which is inside."""
        return _Selecting(self, layer)

    @contextmanager
    def second_wave(self) -> Iterator[None]:
        """Time a second wave, which is inside."""
        marks, start, named = self.mine.marks, self.now(), begin("second wave")
        try:
            yield
        finally:
            end(named)
        if marks is not None:
            marks.waves.append([start, self.now()])

    def _vision_starts(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._see([self.now()])
            self.mine.encoding = begin("vision")

    def _vision_ends(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and self.mine.vision:
            self._see([self.mine.vision[0], self.now()])
            end(self.mine.encoding)
            self.mine.encoding = None

    def _see(self, span: list[Mark]) -> None:
        self.mine.vision, marks = span, self.mine.marks
        if marks is not None and not marks.prefill:  # the call that brings the images encodes them
            marks.vision = span

    def _step_starts(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and self.mine.marks is not None:
            marks = self.mine.marks
            marks.step_starts(self.now())
            self.mine.running = begin("decode" if marks.latest is marks.decode else "prefill")

    def _step_ends(self, *_: Any) -> None:
        if not torch.compiler.is_compiling() and self.mine.marks is not None:
            self.mine.marks.step_ends(self.now())
            end(self.mine.running)  # the language-modeling head, which says so once more, is outside
            self.mine.running = None


def _length(span: Sequence[Mark]) -> float:
    if len(span) < 2 or span[0] is None or span[-1] is None:
        return 0.0
    first, last = span[0], span[-1]
    if isinstance(first, float):
        return float(last - first)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000.0
