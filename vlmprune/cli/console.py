"""What several commands show: how far they are, on stderr while a person waits, and tables of plain texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from vlmprune.progress import Progress

OPEN: Mapping[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 1, 0)}
"""The look of a table of many columns: space in place of lines."""
WEIGHTS = "Loading weights"
"""What transformers calls its bar of them."""


class _Share(ProgressColumn):
    """How many of how many, and how long the rest may take; nothing where that is not known."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        left = "" if task.time_remaining is None else f", {_clock(task.time_remaining)} left"
        return Text(f"{task.completed:g}/{task.total:g}{left}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show ``text`` and the seconds that pass: on stderr, only on a terminal, and gone after the block."""
    with _display() as bar:
        bar.add_task(text, total=None)
        yield


@contextmanager
def progress_bar(doing: str = "starting") -> Iterator[Progress]:
    """Yield what shows how far a command is; where and when as ``waiting``. Weights that are loaded inside move the bar too."""
    with _display() as bar:
        tell = _Told(bar)
        tell(doing, 0, 0)
        if bar.disable:
            yield tell
        else:
            with _weights(tell):
                yield tell


class _Told:
    """The one line of a bar. Where the total changes something else has begun, whose time is its own."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.task = bar, bar.add_task("", total=None)

    def __call__(self, doing: str, done: int, total: int) -> None:
        """As a ``Progress``."""
        if (total or None) != self.bar.tasks[0].total:
            self.bar.remove_task(self.task)
            self.task = self.bar.add_task(doing, total=total or None)
        self.bar.update(self.task, description=doing, completed=done)

    def count(self, done: int, total: int) -> None:
        """How far it is with what was told last."""
        self(self.bar.tasks[0].description, done, total)


def _display() -> Bar:
    console = Console(stderr=True)
    said = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
    columns = (SpinnerColumn(), said, BarColumn(20), _Share(), TimeElapsedColumn())
    off = not console.is_terminal
    return Bar(*columns, console=console, transient=True, expand=True, disable=off)


@contextmanager
def _weights(told: _Told) -> Iterator[None]:
    """Have transformers count the weights that it loads on our bar, as its own is off."""
    from transformers.utils import logging

    def show(bar_of_theirs: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return count(*given) if named.get("desc") == WEIGHTS else bar_of_theirs(*given, **named)

    def count(some: Collection[Any]) -> Iterator[Any]:
        for done, one in enumerate(some):
            told.count(done, len(some))
            yield one
        told.count(0, 0)

    before = logging.set_tqdm_hook(show)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], **look: Any) -> Table:
    """A table to print; cells are texts, whose brackets are no markup, and too long a word is broken, never cut off. ``look`` is
    rich's."""
    out = Table(**look)
    for head in heads:
        out.add_column(head, overflow="fold")
    for row in rows:
        out.add_row(*map(Text, row))
    return out
