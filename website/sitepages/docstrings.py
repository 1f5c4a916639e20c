"""Told to griffe, which reads the docstrings: a section may be called "Example", as ours are, and not only "Examples"."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class OneExample(Extension):
    """Renames the section, whose lines are then read as code and what it gives."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)
