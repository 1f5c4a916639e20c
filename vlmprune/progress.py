"""How a call that takes long says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told what is being done, how far that is, and of how many; 0 of 0 where that is not known."""


def silent(doing: str, done: int, total: int) -> None:
    """Tell nobody."""
