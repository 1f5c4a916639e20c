"""What a person sees while waiting: a spinner and a token counter, on stderr and only when it is a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging


def quiet() -> None:
    """Silence transformers' hints and progress bars in this process; the command line has its own."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


class TokenCounter(BaseStreamer):  # type: ignore[misc]
    """A transformers streamer that moves a progress bar. The prompt arrives first and does not count."""

    def __init__(self, bar: Progress, label: str, limit: int) -> None:
        self._bar = bar
        self._task = bar.add_task(label, total=limit)
        self._prompt = True

    def put(self, value: Any) -> None:
        """New token ids arrived."""
        if not self._prompt:
            self._bar.advance(self._task)
        self._prompt = False

    def end(self) -> None:
        """The answer is complete."""
        self._bar.remove_task(self._task)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a spinner with ``text`` during the block."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def token_bar() -> Progress:
    """A bar to hand to TokenCounter."""
    return bar(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())


def bar(*columns: ProgressColumn) -> Progress:
    """A bar to open with ``with``; invisible unless stderr is a terminal, gone after the block."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
