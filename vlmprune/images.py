"""A picture as a person sees it: upright, 8 bits a channel, RGB. The one way by which images and the frames of clips come in."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from vlmprune.errors import InputError, check, first_line

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is no image, cut short, damaged, or larger than it dares to open."""
WORD = 65535


def open_rgb(path: Path, name: str) -> Image.Image:
    """Read a whole image file; of an animation the first picture.

    Args:
        path: the file.
        name: the argument that errors name.

    Raises:
        InputError: no such file, or one that cannot be read, with the reason.
    """
    check(path.is_file(), name, "an image file", f"{str(path)!r}, which is no file")
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except UNREADABLE as error:
        got = f"{str(path)!r}, which cannot be read: {first_line(error)}"
        raise InputError(f"{name}: expected an image file, got {got}") from error


def open_clip(path: Path, name: str) -> list[Image.Image]:
    """Read a clip: all pictures of an animation (GIF, WebP, PNG), or the image files of a folder in the order of their names.

    Formats that need a codec are not read: `ffmpeg -i clip.mp4 -vf fps=2 FOLDER/%05d.png` makes a folder of one.

    Args:
        path: the file or folder; names beginning with a dot are left out.
        name: the argument that errors name.

    Raises:
        InputError: nothing there, a file that cannot be read, one picture only, or pictures of different sizes.
    """
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and entry.name[0] != ".")
        frames = [open_rgb(file, name) for file in files]
    else:
        check(
            path.is_file(), name, "an animation or a folder of pictures", f"{str(path)!r}, which is neither"
        )
        try:
            with Image.open(path) as image:
                frames = [as_rgb(frame) for frame in ImageSequence.Iterator(image)]
        except UNREADABLE as error:
            got = f"{str(path)!r}, which cannot be read: {first_line(error)}"
            raise InputError(f"{name}: expected an animation (GIF, WebP, PNG), got {got}") from error
    check(len(frames) > 1, name, "two or more pictures", f"{len(frames)} in {str(path)!r}")
    sizes = sorted({frame.size for frame in frames})
    check(len(sizes) == 1, name, f"pictures of one size in {str(path)!r}", sizes)
    return frames


def as_rgb(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF data say and converted to RGB.

    Greys of 16 bits (modes I;16 and I) are scaled to 8, not cut off; mode F is taken as 0 to 1. What is transparent
    becomes white, as on a page. The checkpoint's own processor never sees the original.

    Raises:
        InputError: greys outside these ranges, whose black and white nobody has said.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _grey(image)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """8 bits for modes whose values are wider. Pillow's own conversion cuts off what is above 255."""
    values = np.asarray(image)
    white = 1 if image.mode == "F" else WORD
    least, most = values.min(), values.max()
    ok = bool(least >= 0 and most <= white)  # not so for NaN
    check(ok, f"image of mode {image.mode}", f"greys from 0 to {white}", f"{least} to {most}")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
