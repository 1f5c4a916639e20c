"""The picture that a visitor puts in."""

from __future__ import annotations

from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr

from vlmprune.errors import check


class _WithoutStub(type(gr.Image)):  # type: ignore[misc]
    """Makes the class and no more: Gradio's own also writes a stub beside the file that the class stands in."""

    def __new__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
        return ABCMeta.__new__(cls, name, bases, names)


class Upload(gr.Image, metaclass=_WithoutStub):  # type: ignore[misc]
    """Gradio's image, which takes what was put in and nothing else; Gradio's own would fetch any address that a browser names."""

    is_template = True

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """As Gradio's, for files. Raises InputError for an address."""
        check("://" not in str(url_or_file_path), "picture", "one that was put in here", "an address")
        return await super().async_move_resource_to_block_cache(url_or_file_path)
