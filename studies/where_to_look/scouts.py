"""Scout as it takes part: over three kinds of coarse tokens, and with one thing changed at a time."""

from __future__ import annotations

from vlmprune.policies.base import PruningPolicy


def scouts(depth: int) -> dict[str, PruningPolicy]:
    """Scout by its name in the tables, for a decoder of so many layers."""
    return {}
