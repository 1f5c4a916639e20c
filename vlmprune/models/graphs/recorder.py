"""What captures a run and repeats it: CUDA graphs. (Tests put a recorder of operations in their place.)"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import NamedTuple, Protocol, TypeVar

import torch

from vlmprune.models.graphs.reads import HostReads

T = TypeVar("T")
CAPTURING = RLock()
"""Held while one captures: another's waits for the device would break it, whichever ``Graphs`` it is for."""


WARM_UP = 2
"""Runs until nothing is done for the first time: the first compiles and checks choices in full, the second makes plans."""


class Recording(NamedTuple):
    """A captured run.

    Attributes:
        replay: repeats its work on the tensors that it read, and writes those that it made.
        nbytes: device memory that it holds.
    """

    replay: Callable[[], None]
    nbytes: int


class Recorder(Protocol):
    """What a ``Graphs`` captures with."""

    def refusal(self, device: torch.device) -> str | None:
        """Why it cannot capture on this device; None if it can."""

    def record(self, run: Callable[[], T], device: torch.device) -> tuple[T, Recording]:
        """Call ``run`` as often as it takes to warm up, then capture it. Returns what the captured call did.

        Raises:
            HostRead: the run waits for the device, so that what it does next may depend on what it has read.
        """


class CudaGraphs:
    """Captures with ``torch.cuda.CUDAGraph``, each in a memory pool of its own, which goes with it."""

    def refusal(self, device: torch.device) -> str | None:
        """Why it cannot capture on this device; None if it can."""
        return None if device.type == "cuda" else "no GPU"

    def record(self, run: Callable[[], T], device: torch.device) -> tuple[T, Recording]:
        """As ``Recorder`` has it. A wait is found before the capture, which it would break beyond repair."""
        with CAPTURING:
            return self._record(run, device)

    def _record(self, run: Callable[[], T], device: torch.device) -> tuple[T, Recording]:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # stream: a capture that failed leaves its own as the current one
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        run()
                    with HostReads(device):
                        run()
            finally:  # also behind an error: what these runs read is free to be used again then
                torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            # thread_local: what other threads do meanwhile is no part of it
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                out = run()
            return out, Recording(graph.replay, torch.cuda.memory_reserved() - before)
