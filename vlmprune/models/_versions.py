"""Refuses to go on, in one sentence, where torch, triton or transformers is outside the supported range."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from vlmprune.errors import VersionError

SUPPORTED = {"torch": ((2, 10), None), "triton": ((3, 6), None), "transformers": ((5, 17), (6, 0))}
"""Oldest version that works, and the first that is not expected to, by distribution."""


def check_versions() -> None:
    """Raise VersionError for an installed version outside its range; triton may be missing (without a GPU)."""
    for name, (oldest, end) in SUPPORTED.items():
        try:
            got = version(name)
        except PackageNotFoundError:
            continue  # importing it says so better
        number = tuple(map(int, re.findall(r"\d+", got)[:2]))
        if number < oldest or (end is not None and number >= end):
            below = "" if end is None else f",<{_dotted(end)}"
            raise VersionError(f"{name}: expected {name}>={_dotted(oldest)}{below}, got {got}")


def _dotted(number: tuple[int, int]) -> str:
    return ".".join(map(str, number))


check_versions()  # on import: vlmprune.models imports this before it imports transformers
