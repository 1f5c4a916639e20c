"""The pictures a scene is made of: glyph masks from `atlas.npz` and a bank of muted background textures.

The atlas (16 shapes at 5 angles and 19 sizes, 22 letters at 4 heights, 8-bit coverage) was drawn once with PIL from the
DejaVu fonts. It is a file because the same fonts give other pixels under another FreeType.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ANGLES = 5  # -12, -6, 0, 6, 12 degrees
MARGIN = 80  # by how much a texture is larger than the scene cut out of it
_TEXTURES = 192
_TEXTURE_SEED = 12345

Array = NDArray[np.float32]


@cache
def _atlas() -> dict[str, Array]:
    with np.load(Path(__file__).with_name("atlas.npz")) as stored:
        return {name: stored[name].astype(np.float32) / 255.0 for name in stored.files}


def glyph(shape: int, angle: int, side: int) -> Array:
    """Coverage ``[h, w]`` in 0..1 of a shape whose longer side has ``side`` pixels."""
    return _atlas()[f"s{shape}_{angle}_{side}"]


def letter(index: int, height: int) -> Array:
    """Coverage ``[height, w]`` in 0..1 of a letter."""
    return _atlas()[f"l{index}_{height}"]


@cache
def textures(side: int) -> NDArray[np.uint8]:
    """The bank ``[192, side, side, 3]``: value noise, to which stripes, checks or a gradient may be added."""
    rng = np.random.default_rng(_TEXTURE_SEED)
    bank = np.empty((_TEXTURES, side, side, 3), np.uint8)
    for i in range(_TEXTURES):
        tone = _tone(rng, side)
        base = rng.uniform(60, 150) + rng.uniform(-22, 22, 3)
        image = base + tone[..., None] * (1 + rng.uniform(-0.25, 0.25, 3))
        image = image + rng.standard_normal((side, side, 3)) * rng.uniform(1, 7)
        bank[i] = np.clip(image, 0, 225)
    return bank


def _tone(rng: np.random.Generator, side: int) -> Array:
    """Brightness ``[side, side]`` around zero."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    tone = np.zeros((side, side), np.float32)
    for octave in (4, 9, 20, 48, 100):
        noise = rng.standard_normal((octave, octave)).astype(np.float32)
        tone += _stretch(noise, side) * (12 / (1 + octave / 20)) * rng.uniform(0.4, 1.6)
    kind = rng.integers(0, 4)
    if kind == 1:
        angle = rng.uniform(0, 3.14)
        depth = rng.uniform(5, 14)
        tone += depth * np.sign(np.sin((x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(0.15, 0.7)))
    elif kind == 2:
        width = rng.integers(7, 24)
        tone += rng.uniform(4, 12) * ((x // width + y // width) % 2 * 2 - 1)
    elif kind == 3:
        angle = rng.uniform(0, 6.28)
        tone += (x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(0.1, 0.35)
    return tone


def _stretch(noise: Array, side: int) -> Array:
    """Bilinear enlargement of a square to ``[side, side]``."""
    place = np.linspace(0, noise.shape[0] - 1.001, side)
    low = place.astype(int)
    part = (place - low)[:, None]
    rows = noise[low] * (1 - part) + noise[low + 1] * part
    return (rows.T[low] * (1 - part) + rows.T[low + 1] * part).T
