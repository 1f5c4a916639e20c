"""Refuses to go on, in one sentence, where torch, triton or transformers is outside the supported range."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

from vlmprune.errors import VersionError

Release = tuple[int, int]

SUPPORTED: dict[str, tuple[Release, Release | None]] = {
    "torch": ((2, 11), None),
    "triton": ((3, 6), None),
    "transformers": ((5, 17), (6, 0)),
}
"""Oldest version that works, and the first that is not expected to, by distribution."""
TESTED: dict[str, tuple[Release, ...]] = {
    "torch": ((2, 11), (2, 13)),
    "triton": ((3, 6), (3, 9)),
    "transformers": ((5, 17), (5, 23), (5, 24)),
}
"""Versions that every test was run with. A newer one may be right too: ``vlmprune check MODEL`` says so in seconds."""


def check_versions() -> None:
    """Raise VersionError for an installed version outside its range, warn of one that is newer than any tested.

    triton may be missing (without a GPU).
    """
    for name, (oldest, end) in SUPPORTED.items():
        try:
            got = version(name)
        except PackageNotFoundError:
            continue  # importing it says so better
        have = release(got)
        if have < oldest or (end is not None and have >= end):
            below = "" if end is None else f",<{dotted(end)}"
            raise VersionError(f"{name}: expected {name}>={dotted(oldest)}{below}, got {got}")
        if have > TESTED[name][-1]:
            newest = dotted(TESTED[name][-1])
            warnings.warn(
                f"vlmprune was tested with {name} up to {newest}, this is {got}: run `vlmprune check MODEL` first",
                stacklevel=2,
            )


def release(got: str) -> Release:
    """Major and minor part of a version."""
    major, minor = map(int, re.findall(r"\d+", got)[:2])
    return major, minor


def dotted(got: Release) -> str:
    """The way a version is written."""
    return ".".join(map(str, got))


check_versions()  # on import: vlmprune.models imports this before it imports transformers
