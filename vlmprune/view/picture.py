"""The picture of a pruning: what the model saw, with the patches of dropped tokens dimmed. PIL only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, tensor

from vlmprune.errors import check
from vlmprune.policies.base import Grid
from vlmprune.view.outcome import Outcome

PANEL = 280  # panels are enlarged by a whole factor to at least this, so that small images stay legible
GAP = 12
CAPTION = 20
TITLE = 24
INK, PAPER, DIMMED = (32, 32, 36), (255, 255, 255), (24, 24, 28)
STRENGTH = 0.82  # how much of a dropped patch is replaced by DIMMED


def check_target(path: Path) -> None:
    """Raise InputError unless a picture can be written there; asked before anything slow."""
    known = path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    check(known, "--save", "a file name ending in .png, .jpg or .webp", repr(str(path)))
    check(path.parent.is_dir(), "--save", "a file in an existing folder", repr(str(path)))


def seen_images(pixels: Tensor, image_processor: Any) -> list[Image.Image]:
    """Undo normalising and rescaling of ``pixels [I, 3, H, W]``: the resized, cropped images the model saw."""
    if image_processor.do_normalize:
        mean, std = (
            tensor(values)[:, None, None]
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        pixels = pixels * std + mean
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    array = pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(image) for image in array]


def dim_dropped(image: Image.Image, grid: Grid, kept: set[int]) -> Image.Image:
    """``image`` with every patch of ``grid`` dimmed whose number (raster order) is not in ``kept``."""
    rows, columns = grid
    seen = Image.new("L", (columns, rows))
    seen.putdata([255 * (patch in kept) for patch in range(rows * columns)])
    faded = Image.blend(image, Image.new("RGB", image.size, DIMMED), STRENGTH)
    return Image.composite(image, faded, seen.resize(image.size, Image.Resampling.NEAREST))


def panels(image: Image.Image, number: int, grid: Grid, outcome: Outcome) -> list[tuple[str, Image.Image]]:
    """Caption and picture of image ``number``: unpruned first, then after each stage of ``outcome``."""
    size = grid[0] * grid[1]
    out = [(f"unpruned: {size}", image)]
    for (layer, *_), kept in zip(outcome.report.stages, outcome.kept, strict=True):
        mine = {k - number * size for k in kept if k // size == number}
        out.append((f"from layer {layer}: {len(mine)} of {size}", dim_dropped(image, grid, mine)))
    return out


def draw(images: list[Image.Image], grid: Grid, outcomes: list[Outcome]) -> Image.Image:
    """One row per policy and image (or a single unpruned one): a title with the answer, then the panels."""
    factor = max(1, -(-PANEL // images[0].height))
    large = [ImageOps.scale(image, factor, Image.Resampling.LANCZOS) for image in images]
    pruned = [outcome for outcome in outcomes if outcome.policy is not None] or outcomes
    width, height = large[0].size
    rows = [
        (f"{outcome.label}  ->  {outcome.answer}", panels(image, number, grid, outcome))
        for outcome in pruned
        for number, image in enumerate(large)
    ]
    most = max(len(row) for _, row in rows)
    step = TITLE + CAPTION + height + GAP
    sheet = Image.new("RGB", (GAP + most * (width + GAP), GAP + len(rows) * step), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (title, row) in enumerate(rows):
        top = GAP + i * step
        pen.text((GAP, top), title, fill=INK, font=ImageFont.load_default(15))
        for j, (caption, picture) in enumerate(row):
            left = GAP + j * (width + GAP)
            pen.text((left, top + TITLE), caption, fill=INK, font=ImageFont.load_default(12))
            sheet.paste(picture, (left, top + TITLE + CAPTION))
    return sheet
