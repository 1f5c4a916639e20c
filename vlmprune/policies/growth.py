"""How the work of a choice grows with the number of visual tokens: the words for it, and the worst of several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Growth = Literal["n", "n^2", "n^3"]
GROWTHS: tuple[Growth, ...] = ("n", "n^2", "n^3")


def worst(growths: Iterable[Growth | None]) -> Growth | None:
    """The fastest of several; None = unknown, as soon as one of them is.

    Example:
        >>> worst(["n", "n^2"]), worst(["n^3", None])
        ('n^2', None)
    """
    known: list[Growth] = []
    for growth in growths:
        if growth is None:
            return None
        known.append(growth)
    return max(known, key=GROWTHS.index)
