"""How long vision, prefill, selection and decode take: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from vlmprune.models.host.parts import Parts
from vlmprune.models.per_thread import PerThread

Mark = Any  # a float (seconds), or a recorded torch.cuda.Event


@dataclass(frozen=True)
class Seconds:
    """Durations of the latest generation, in seconds. ``selection`` is part of ``prefill``; 0.0 = did not happen.

    Attributes:
        vision: vision tower and projector.
        prefill: decoder over the prompt, language-model head included.
        selection: scoring, selecting and gathering, all stages together.
        decode: from the start of the first decode step to the end of the last one.
    """

    vision: float
    prefill: float
    selection: float
    decode: float


def untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, but not in compiled code: a compiled step is one graph, and a clock is no part of it."""

    @wraps(hook)
    def outside(*args: Any) -> None:
        if not torch.compiler.is_compiling():
            hook(*args)

    return outside


class Marks:
    """When the parts of one prefill, and of the decoding after it, began and ended.

    Read out only when asked, so timing never makes the host wait. ``vision`` may have begun before the prefill.
    """

    def __init__(self, vision: list[Mark] | None = None) -> None:
        self.vision: list[Mark] = [] if vision is None else vision
        self.steps: list[list[Mark]] = []
        self.count, self.more = 0, False
        self.chosen: list[list[Mark]] = []

    def extend(self) -> None:
        """The coming step is another chunk of the latest one."""
        self.more = bool(self.steps)

    def step_starts(self, mark: Mark) -> None:
        """The decoder begins a prompt chunk or a decode step."""
        if self.more:
            self.more = False
            return
        self.count += 1
        if len(self.steps) == 3:  # prefill, first decode step, latest decode step are all that is ever read
            self.steps.pop()
        self.steps.append([mark])

    def step_ends(self, mark: Mark) -> None:
        """It is done; the text model says so first, then the language-modeling head."""
        if self.steps:
            self.steps[-1] = [self.steps[-1][0], mark]

    def seconds(self) -> Seconds:
        """Read the marks out; on a GPU this waits for the work they mark."""
        decode = [self.steps[1][0], self.steps[-1][-1]] if len(self.steps) > 1 else []
        return Seconds(
            vision=_length(self.vision),
            prefill=_length(self.steps[0]) if self.steps else 0.0,
            selection=sum(_length(span) for span in self.chosen),
            decode=_length(decode),
        )


class Clock:
    """Makes the marks, from hooks. Every thread times the prompt it runs.

    Hooks are methods and no closures: a copied model's hooks must belong to the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mine = PerThread(vision=None, marks=None)

    def begin(self) -> Marks:
        """This thread starts a prompt: the marks to come are its own."""
        self.mine.marks = Marks(self.mine.vision)
        marks: Marks = self.mine.marks
        return marks

    def resume(self, marks: Marks) -> None:
        """This thread goes on with a prompt."""
        self.mine.marks = marks

    def now(self) -> Mark:
        """A mark in the stream of work, or the time."""
        if self.device.type != "cuda":
            return time.perf_counter()
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

    @contextmanager
    def selection(self) -> Iterator[None]:
        """Time a piece of selection work."""
        span = [self.now()]
        try:
            yield
        finally:
            self.mine.marks.chosen.append([*span, self.now()])

    @untraced
    def _vision_starts(self, *_: Any) -> None:
        self.mine.vision = [self.now()]
        if (
            self.mine.marks is not None and not self.mine.marks.steps
        ):  # the call that brings the images encodes them
            self.mine.marks.vision = self.mine.vision

    @untraced
    def _vision_ends(self, *_: Any) -> None:
        if self.mine.vision:
            self.mine.vision[1:] = [self.now()]

    @untraced
    def _step_starts(self, *_: Any) -> None:
        if self.mine.marks is not None:
            self.mine.marks.step_starts(self.now())

    @untraced
    def _step_ends(self, *_: Any) -> None:
        if self.mine.marks is not None:
            self.mine.marks.step_ends(self.now())


def _length(span: list[Mark]) -> float:
    if len(span) < 2:
        return 0.0
    first, last = span[0], span[-1]
    if isinstance(first, float):
        return float(last - first)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000.0
