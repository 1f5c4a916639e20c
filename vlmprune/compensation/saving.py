"""A folder that a kill while it is written leaves as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmprune.errors import check


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside to write into; at the end of the block it takes the place of ``folder``.

    A folder cannot be replaced in one step, so the old one stands as ``NAME.old`` for a moment: read with ``standing``,
    there is a whole one at any time. If the block raises, ``folder`` stays as it was.

    Raises:
        InputError: a file stands there.
    """
    folder = Path(folder).resolve()
    check(not folder.is_file(), "folder", "a folder to write", f"{folder}, which is a file")
    beside, old = folder.with_name(f"{folder.name}.new"), _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (beside, old):
        shutil.rmtree(left, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def standing(folder: str | Path) -> Path:
    """The folder to read: itself, or the old one where ``replacing`` was killed between its two steps."""
    folder = Path(folder).resolve()
    return folder if folder.exists() or not _old(folder).exists() else _old(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")
