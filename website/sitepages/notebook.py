"""A notebook as a page: its text, its code, and what each cell gave when it was last run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PICTURE = '<img alt="what the cell shows" src="data:image/png;base64,{}">'


def notebook_page(path: str, text: str) -> str:
    """The Markdown of a notebook.

    Args:
        path: of the notebook, in the repository.
        text: its JSON.

    Raises:
        ValueError: an output of a kind that no page can show.
    """
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts += [f"```python\n{source}\n```", *map(_shown, cell["outputs"])]
    parts.insert(1, f"*A notebook, `{path}`, with what it gave when it was last run.*")
    return "\n\n".join(parts) + "\n"


def _shown(output: Mapping[str, Any]) -> str:
    """One output: the richest kind that a page can show."""
    if output["output_type"] == "stream":
        return _text(output["text"])
    data = output["data"]
    if "image/png" in data:
        return PICTURE.format("".join("".join(data["image/png"]).split()))
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if "text/plain" in data:
        return _text(data["text/plain"])
    raise ValueError(f"output: expected a picture, Markdown or text, got {', '.join(data)}")


def _text(lines: str | list[str]) -> str:
    return f"```text\n{''.join(lines).rstrip()}\n```"
