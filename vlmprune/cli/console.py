"""What several commands show: a spinner on stderr while a person waits, and tables of plain texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text


def waiting(text: str) -> Status:
    """A spinner with ``text``, to open with ``with``; seen on a terminal only."""
    return Console(stderr=True).status(text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], **look: Any) -> Table:
    """A table to print; cells are texts, whose brackets are no markup. ``look`` is rich's."""
    out = Table(*heads, **look)
    for row in rows:
        out.add_row(*map(Text, row))
    return out
