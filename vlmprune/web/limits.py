"""What a visitor may send: pictures of three formats and bounded size, questions of bounded length. All checked here, on the server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.errors import InputError, check
from vlmprune.images import UNREADABLE, as_rgb
from vlmprune.policies.registry import list_policies

BYTES = 10 * 2**20
PIXELS = 40_000_000
SIDES = 20
"""Times the shorter side of a picture that its longer one may have: processors scale the shorter one to a fixed length."""
FORMATS = {"PNG": "PNG", "JPEG": "JPEG", "WEBP": "WebP"}
LETTERS = 1000


def open_picture(path: Path, name: str) -> Image.Image:
    """Read an uploaded picture, upright and RGB.

    Args:
        path: where it lies.
        name: what the visitor calls it.

    Raises:
        InputError: too large a file, another format, too many pixels, too long and thin, or damaged. No path is told.
    """
    wanted = f"a whole {' or '.join(FORMATS.values())} file"
    try:
        size = path.stat().st_size
        check(size <= BYTES, "picture", f"at most {BYTES // 2**20} MB", f"{name!r} of {size / 2**20:.1f} MB")
        with Image.open(path, formats=list(FORMATS)) as image:
            _check_sides(*image.size)
            return as_rgb(image)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"picture: expected {wanted}, got {name!r}, which cannot be read") from error


def _check_sides(width: int, height: int) -> None:
    """Before a pixel is decoded: the header alone says how much memory the rest would take."""
    got = f"{width} x {height}"
    check(width * height <= PIXELS, "picture", f"at most {PIXELS // 10**6} million pixels", got)
    fits = max(width, height) <= SIDES * min(width, height)
    check(fits, "picture", f"one side at most {SIDES} times the other", got)


def read_picture(payload: Any, uploads: Path) -> tuple[Image.Image, Path, str]:
    """The picture of an image component as it is sent, where it lies, and what the visitor calls it.

    Args:
        payload: as the browser sent it: the path in it is the visitor's word.
        uploads: folder of what visitors put in; no file outside it is opened.

    Raises:
        InputError: none, one that lies elsewhere, or one that ``open_picture`` refuses.
    """
    sent = isinstance(payload, Mapping) and isinstance(payload.get("path"), str)
    check(sent, "picture", "a picture", "none")
    path = Path(payload["path"])
    check(_lies_in(path, uploads), "picture", "one that was put in here", "another file")
    called = payload.get("orig_name")
    name = Path(called).name if isinstance(called, str) and Path(called).name else path.name
    return open_picture(path, name), path, name


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether it is a file there, links followed."""
    try:
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # too long a name, a zero byte
        return False


def read_prompt(sent: Any) -> str:
    """The question as it is asked. Raises InputError for none, or too long a one."""
    prompt = sent.strip() if isinstance(sent, str) else ""
    check(0 < len(prompt) <= LETTERS, "question", f"a text of 1 to {LETTERS} letters", f"{len(prompt)}")
    return prompt


def read_budget(sent: Any) -> float:
    """Visual tokens of the image, a mean over the layers. Raises InputError for what is no number of at least 1."""
    number = isinstance(sent, int | float) and not isinstance(sent, bool) and math.isfinite(sent)
    check(number and sent >= 1, "budget", "a number of visual tokens, at least 1", repr(sent))
    return float(sent)


def read_methods(sent: Any) -> tuple[str, ...]:
    """The ticked methods, in the order of ``list_policies``. Raises InputError for any other."""
    listed = isinstance(sent, list) and all(isinstance(name, str) for name in sent)
    check(listed, "methods", "a list of names", type(sent).__name__)
    known = list_policies()
    unknown = sorted(set(sent) - set(known))
    check(not unknown, "methods", "names that `vlmprune list` has", ", ".join(map(repr, unknown)))
    return tuple(name for name in known if name in sent)
