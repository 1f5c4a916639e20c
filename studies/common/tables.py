"""Markdown tables of means with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlmprune.eval import Estimate
from vlmprune.eval.page import points

NONE = "-"
"""A cell of what could not be measured."""


def gain(estimate: Estimate) -> str:
    """A difference in percentage points, bold where its interval is clear of zero."""
    text = points(estimate)
    return text if estimate.low <= 0 <= estimate.high else f"**{text}**"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table, without a line break at its end."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
