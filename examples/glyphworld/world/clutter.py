"""What makes a scene hard to prune: photographs behind it, and things that look like what is asked about and are not.

On a smooth background whatever differs is an object. Here most of what differs is none.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from world import sprites
from world.words import COLORS, SHAPES

FIRST_SEED = 1_000_000  # training draws scenes from here on, and their photographs are its own
OTHER_COLORS = {
    "black": (25, 25, 25),
    "grey": (125, 125, 125),
    "brown": (115, 70, 35),
    "pink": (245, 150, 185),
}
"""No word of the language names these: what has such a colour is not an object."""

_WHOLE = {"circle", "square", "triangle", "diamond", "ring", "moon"}  # half a square, say, is a shape too
_HALVED = [shape for shape in SHAPES if shape not in _WHOLE]
_DECOYS, _HALVES = 5, 4  # at most, at full clutter
_TEXTURES = 0.2  # share of the photographs of which a small piece fills the scene
_PIECE = (24, 64)  # pixels of such a piece
_WINDOW = (160, 400)  # pixels of a photograph that a scene shows, as far as it has them
_BRIGHTEST = 225.0  # of a background: what is asked about may be white
_GROWTH = 1.75  # how much larger than without clutter a large object may be


def photograph(rng: np.random.Generator, side: int, seed: int) -> sprites.Array:
    """A background ``[side, side, 3]``: a part of a photograph, or a texture made of a small piece of one."""
    bank = photographs(seed)
    image = bank[rng.integers(len(bank))]
    texture = rng.random() < _TEXTURES
    low, high = _PIECE if texture else _WINDOW
    window = int(rng.integers(low, min(high, *image.size) + 1))
    left, top = (int(rng.integers(0, length - window + 1)) for length in image.size)
    part = image.crop((left, top, left + window, top + window))
    if not texture:
        part = part.resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(part, np.float32)
    if texture:  # pieces side by side, each the mirror image of its neighbours
        around = (0, -(-side // window) * window - window)
        pixels = np.pad(pixels, (around, around, (0, 0)), "symmetric")[:side, :side]
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.5:
        pixels = pixels.transpose(1, 0, 2)
    tint = rng.uniform(0.75, 1.1) * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    return np.clip(pixels * tint, 0, _BRIGHTEST)


def decoys(rng: np.random.Generator, clutter: float) -> list[tuple[sprites.Array, NDArray[np.floating]]]:
    """Coverage and colour of what is drawn beside the objects: whole glyphs in other colours, and halves of glyphs."""
    drawn = []
    others, named = list(OTHER_COLORS.values()), list(COLORS.values())
    for _ in range(int(rng.integers(0, round(_DECOYS * clutter) + 1))):
        coverage = sprites.glyph(int(rng.integers(len(SHAPES))), *_turn_and_size(rng, 11))
        drawn.append((coverage, _paint(rng, others)))
    for _ in range(int(rng.integers(0, round(_HALVES * clutter) + 1))):
        shape = SHAPES.index(_HALVED[rng.integers(len(_HALVED))])
        coverage = _half(rng, sprites.glyph(shape, *_turn_and_size(rng, 17)))
        drawn.append((coverage, _paint(rng, others + named)))
    return drawn


def grown(rng: np.random.Generator, coverage: sprites.Array, clutter: float) -> sprites.Array:
    """A large glyph, made up to ``_GROWTH`` times larger at full clutter."""
    factor = rng.uniform(1.0, 1.0 + clutter * (_GROWTH - 1.0))
    height, width = (round(length * factor) for length in coverage.shape)
    mask = Image.fromarray((coverage * 255).astype(np.uint8))
    return np.asarray(mask.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255


def _turn_and_size(rng: np.random.Generator, least: int) -> tuple[int, int]:
    return int(rng.integers(sprites.ANGLES)), int(rng.integers(least, 28))


def _half(rng: np.random.Generator, coverage: sprites.Array) -> sprites.Array:
    """One half: left, right, upper or lower."""
    height, width = (length // 2 for length in coverage.shape)
    parts = coverage[:, :width], coverage[:, width:], coverage[:height], coverage[height:]
    return parts[rng.integers(len(parts))]


def _paint(rng: np.random.Generator, colors: list[tuple[int, int, int]]) -> NDArray[np.floating]:
    return np.clip(np.array(colors[rng.integers(len(colors))]) + rng.uniform(-14, 14, 3), 0, 255)


def photographs(seed: int) -> list[Image.Image]:
    """The pictures that may stand behind the scene of this seed: those that training uses, or those that it never does."""
    return _photographs("training" if seed >= FIRST_SEED else "unseen")


@cache
def _photographs(folder: str) -> list[Image.Image]:
    paths = sorted((Path(__file__).parent / "photographs" / folder).glob("*.webp"))
    return [Image.open(path).convert("RGB") for path in paths]
