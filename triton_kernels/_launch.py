"""Launching kernels: at once, or recorded, so that a plan can repeat the launches with new pointers and nothing else.

Every launcher that prune_tokens goes through starts its kernels with ``launch``. A recording turns the same launcher
into the description of its work, so the fast path is never a second copy of the slow one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import itemgetter
from threading import Lock
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from vlmprune import env

STREAM = 3  # where a launch takes its stream: behind the grid
INTERPRETED = triton.knobs.runtime.interpret

_recording: ContextVar[list | None] = ContextVar("vlmprune_recording", default=None)


class Launch(NamedTuple):
    """One kernel launch: ``kernel[grid](*args, **meta)``."""

    kernel: Any
    grid: tuple
    args: tuple
    meta: dict


def launch(kernel, grid, *args, **meta):
    """``kernel[grid](*args, **meta)``, or a note of it inside ``recording()``.

    A kernel with a constant PDL waits by itself for the launch before it, and says when the next may begin.
    """
    recorded = _recording.get()
    if "PDL" in kernel.arg_names:
        pdl = env.PDL and _has_pdl()
        meta = meta | ({"PDL": True, "launch_pdl": True} if pdl else {"PDL": False})
    if recorded is None:
        kernel[grid](*args, **meta)
    else:
        recorded.append(Launch(kernel, grid, args, meta))


def _has_pdl():
    """Whether the current device knows programmatic dependent launch."""
    if INTERPRETED:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


@contextmanager
def recording() -> Iterator[list]:
    """Inside, launches are appended to the list this yields, and nothing runs."""
    recorded: list = []
    token = _recording.set(recorded)
    try:
        yield recorded
    finally:
        _recording.reset(token)


class _Slot(NamedTuple):
    """Stands in a recorded argument list where run-time tensor ``at`` goes, seen as ``dtype``."""

    at: int
    dtype: torch.dtype


class Replay:
    """A recorded launch whose tensors can be exchanged; compiled when made, so that a call only packs arguments.

    Args:
        recorded: the launch.
        slots: data pointer -> number of the run-time tensor that takes this place. Other tensors, the workspace, stay.
    """

    def __init__(self, recorded, slots):
        kernel, grid, args, meta = recorded
        self.used = set()
        self.workspace = []
        self._kernel, self._meta, self._grid = kernel, meta, (*grid, 1, 1)[:3]
        names = [*kernel.arg_names]
        self.counter = args[names.index("counter_ptr")] if "counter_ptr" in names else None
        self._args = [self._template(arg, slots) for arg in args]
        if INTERPRETED:
            return
        compiled = kernel.warmup(*args, grid=grid, **meta)
        self._run = compiled.run  # loads the binary now: a CUDA graph under capture could not
        # What a launch is called with: what never changes, and where to put what does.
        start = [*self._grid, None, compiled.function, compiled.packed_metadata, None, None, None]
        every = [*start, *self._args, *[meta[name] for name in names[len(args) :]]]
        self._fixed = [None if isinstance(arg, _Slot | list) else arg for arg in every]
        self._slots = [(place, arg.at) for place, arg in enumerate(every) if isinstance(arg, _Slot)]
        self._tuples = [(place, _getter(arg)) for place, arg in enumerate(every) if isinstance(arg, list)]

    def _template(self, arg, slots):
        """``arg`` with a _Slot for every exchangeable tensor; a tuple that holds some becomes a list."""
        if isinstance(arg, tuple):
            inner = [self._template(item, slots) for item in arg]
            return inner if any(isinstance(item, _Slot | list) for item in inner) else tuple(inner)
        if not isinstance(arg, torch.Tensor):
            return arg
        if arg.data_ptr() in slots:
            self.used.add(slots[arg.data_ptr()])
            return _Slot(slots[arg.data_ptr()], arg.dtype)
        self.workspace.append(arg)
        return arg if INTERPRETED else arg.data_ptr()

    def arguments(self, pointers):
        """What the compiled kernel is called with, but for the stream; ``pointers`` has one for every run-time tensor."""
        args = self._fixed.copy()
        for place, at in self._slots:
            args[place] = pointers[at]
        for place, get in self._tuples:
            args[place] = get(pointers)
        return args

    def launch(self, args, stream):
        """Launch the compiled kernel on ``stream``."""
        args[STREAM] = stream
        self._run(*args)

    def interpret(self, tensors):
        """Run the kernel in the interpreter with ``tensors`` in the places of the recorded ones."""
        self._kernel[self._grid](*[_view(arg, tensors) for arg in self._args], **self._meta)


def _getter(node):
    """Function of the pointers that gives the argument a template stands for."""
    if isinstance(node, _Slot):
        return itemgetter(node.at)
    if not isinstance(node, list):
        return lambda pointers: node
    if node and all(isinstance(item, _Slot) for item in node):
        ats = [item.at for item in node]
        return itemgetter(*ats) if len(ats) > 1 else itemgetter(slice(ats[0], ats[0] + 1))
    inner = [_getter(item) for item in node]
    return lambda pointers: tuple([get(pointers) for get in inner])


def _view(node, tensors):
    """Put tensors in the places of slots, each seen as the dtype that was recorded."""
    if isinstance(node, _Slot):
        return tensors[node.at].view(node.dtype)
    return tuple(_view(item, tensors) for item in node) if isinstance(node, list) else node


class Program:
    """Recorded launches in a row, to run again and again on other tensors of the same layout.

    Args:
        recorded: the launches.
        exchanged: the tensors that each run brings along, in the order it brings them; their pointers must differ.
    """

    def __init__(self, recorded, exchanged):
        slots = {x.data_ptr(): i for i, x in enumerate(exchanged) if x.numel()}
        self._device = exchanged[0].device.index
        self._replays = [Replay(one, slots) for one in recorded]
        self._lock = Lock()  # the launches of two threads share a workspace
        self.used = set().union(*(replay.used for replay in self._replays))
        kept = {x.data_ptr(): x.nbytes for replay in self._replays for x in replay.workspace}
        self.nbytes = sum(kept.values())

    def bind(self, tensors, pointers):
        """A function without arguments that launches everything on ``tensors``, which it keeps alive."""
        if INTERPRETED:
            return lambda: self._interpret(tensors)
        arguments = self._arguments(pointers)
        return lambda tensors=tensors: self._launch(arguments)

    def run(self, tensors, pointers):
        """``bind`` for one run, and that run."""
        if INTERPRETED:
            self._interpret(tensors)
        else:
            self._launch(self._arguments(pointers))

    def _arguments(self, pointers):
        """What each kernel is called with; of a tuple of pointers a slice is a tuple, too."""
        pointers = tuple(pointers)
        return [replay.arguments(pointers) for replay in self._replays]

    def _launch(self, arguments):
        """Launch everything on the current stream of the plan's device."""
        if driver.active.get_current_device() != self._device:
            with torch.cuda.device(self._device):
                return self._launch(arguments)
        stream = driver.active.get_current_stream(self._device)
        with self._lock:
            for replay, args in zip(self._replays, arguments, strict=True):
                replay.launch(args, stream)

    def _interpret(self, tensors):
        with self._lock:
            for replay in self._replays:
                replay.interpret(tensors)

    def reset(self):
        """Set the counters to 0, where a run that ends leaves them."""
        for replay in self._replays:
            if replay.counter is not None:
                replay.counter.zero_()
