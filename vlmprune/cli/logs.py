"""``--verbose``: what the package logs, a line each on stderr, and the first lines: which versions are at work."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from vlmprune import __version__

PACKAGES = ("torch", "triton", "transformers", "numpy", "pillow", "flash-attn")


class _Lines(logging.Handler):
    """Writes to stderr as it is at that moment, as a progress bar that is shown takes it over and prints above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)  # noqa: T201


@contextmanager
def shown() -> Iterator[None]:
    """Show what is logged inside the block."""
    logger, lines = logging.getLogger("vlmprune"), _Lines()
    lines.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    before = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        found = versions().items()
        logger.info("%s", ", ".join(f"{name} {number}" for name, number in found if number))
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before)


def versions() -> dict[str, str | None]:
    """Of Python and of every package that matters; None = it is not installed. Imports none of them."""
    own = {"python": platform.python_version(), "vlmprune": __version__}
    return own | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
