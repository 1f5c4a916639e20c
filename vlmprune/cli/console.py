"""What several commands show: a spinner or a bar on stderr while a person waits, and tables of plain texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text


def waiting(text: str) -> Status:
    """A spinner with ``text``, to open with ``with``; seen on a terminal only."""
    return Console(stderr=True).status(text)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield what shows how far a command is: on stderr, only on a terminal, and gone after the block."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def tell(doing: str, done: int, total: int) -> None:
            bar.update(task, description=doing, completed=done if total else None, total=total or None)

        yield tell


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], **look: Any) -> Table:
    """A table to print; cells are texts, whose brackets are no markup. ``look`` is rich's."""
    out = Table(*heads, **look)
    for row in rows:
        out.add_row(*map(Text, row))
    return out
