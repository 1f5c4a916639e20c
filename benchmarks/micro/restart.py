"""What a process does that measures one thing after the other and loses its device: it ends, and another goes on behind it.

After an illegal access every later CUDA call of the process fails, and each would be blamed on what happened to run then.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

LOST = 75  # exit code of a process whose device is lost
CRASHES = (LOST, -signal.SIGSEGV, -signal.SIGABRT)
WORDS = ("CUDA error", "Triton Error [CUDA]")


class DeviceLostError(Exception):
    """Nothing can be measured in this process any more."""


class Journal:
    """Names of what was begun, in a file that outlives the process; without a file nothing is remembered."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._begun = set() if path is None or not path.exists() else set(path.read_text().splitlines())

    def __contains__(self, name: str) -> bool:
        return name in self._begun

    def begin(self, name: str) -> bool:
        """Whether ``name`` is to be done now: it was not begun before. It is written down first, as it may end the process."""
        if name in self:
            return False
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(f"{name}\n")
        return True


def device_lost(error: BaseException) -> bool:
    """Whether CUDA, or Triton's call of it, failed: no later call of this process can be trusted."""
    import torch  # here: who only starts processes again does not wait for it

    return isinstance(error, torch.AcceleratorError) or any(word in str(error) for word in WORDS)


def leave() -> None:
    """End this process without the clean-up of a device that is no longer there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST)


def run_to_the_end(run: Callable[[], int], journal: Path) -> tuple[int, int]:
    """(exit code, restarts): call ``run``, which starts a process, again as long as that crashed and began something new."""
    restarts, begun = 0, _size(journal)
    while (code := run()) in CRASHES and _size(journal) > begun:
        restarts, begun = restarts + 1, _size(journal)
    return code, restarts


def _size(journal: Path) -> int:
    return journal.stat().st_size if journal.exists() else 0
