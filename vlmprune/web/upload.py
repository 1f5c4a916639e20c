"""The picture that a visitor puts in. Alone in its file: Gradio writes a stub beside whatever file has a component of its own."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from vlmprune.errors import check


class Upload(gr.Image):  # type: ignore[misc]
    """Gradio's image, which takes what was put in and nothing else; Gradio's own would fetch any address that a browser names."""

    is_template = True

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """As Gradio's, for files. Raises InputError for an address."""
        check("://" not in str(url_or_file_path), "picture", "one that was put in here", "an address")
        return await super().async_move_resource_to_block_cache(url_or_file_path)
