"""Pictures inside the page: enlarged so that small ones stay legible, and the veils that dim what a stage drops."""

from __future__ import annotations

import base64
import io

from PIL import Image, ImageOps

from vlmprune.policies.base import Grid
from vlmprune.view.picture import DIMMED, STRENGTH

SIDE = 448
"""Pixels that the shorter side of a picture has at least, after it is enlarged by a whole factor."""


def veil(grid: Grid, kept: set[int]) -> Image.Image:
    """What dims the dropped patches when it lies over the picture: one RGBA pixel a patch, blended as ``dim_dropped`` does."""
    rows, columns = grid
    image = Image.new("RGBA", (columns, rows))
    dropped = (*DIMMED, round(255 * STRENGTH))
    image.putdata([(*DIMMED, 0) if patch in kept else dropped for patch in range(rows * columns)])
    return image


def enlarged(image: Image.Image) -> Image.Image:
    """The picture, or a larger one."""
    factor = -(-SIDE // min(image.size))
    return ImageOps.scale(image, factor, Image.Resampling.LANCZOS) if factor > 1 else image


def data_uri(image: Image.Image, form: str) -> str:
    """The picture as part of the page (``form``: "PNG" or "WEBP"): it is stored nowhere, and nobody else can ask for it."""
    file = io.BytesIO()
    image.save(file, form, quality=90)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
