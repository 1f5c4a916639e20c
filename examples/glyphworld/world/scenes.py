"""A scene by its seed: 3 to 9 coloured glyphs and often a sign of three letters on a textured background.

With clutter the background is a photograph, and other things stand between the glyphs (`clutter.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from world import clutter as cluttered
from world import sprites
from world.words import COLOR_NAMES, COLORS, LETTERS, SHAPES, SIZE_NAMES, SIZES

SIDES = (112, 192)  # pixels; with patches of 8: 196 and 576 visual tokens
CELLS = 7  # a scene has 7 x 7 cells
_BOX_STEPS = 32  # box corners are answered in whole steps from 0 to 32
_SIGN_PAD = 3
_LETTER_GAP = 2


class Box(NamedTuple):
    """Pixels, right and bottom excluded."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Thing:
    """One glyph: indices into SHAPES, COLOR_NAMES and SIZE_NAMES, and its coverage ``[h, w]`` inside ``box``."""

    shape: int
    color: int
    size: int
    box: Box
    coverage: sprites.Array


@dataclass(frozen=True)
class Sign:
    """A plate with letters (indices into LETTERS), and the box of each letter."""

    letters: tuple[int, ...]
    box: Box
    letter_boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Scene:
    """The picture ``image [side, side, 3]`` uint8 and everything in it."""

    image: NDArray[np.uint8]
    things: tuple[Thing, ...]
    sign: Sign | None

    @property
    def side(self) -> int:
        """Pixels of the square image."""
        return self.image.shape[0]

    def steps(self, box: Box) -> tuple[int, int, int, int]:
        """The box as it is answered: in steps of 4 pixels (6 at 192 pixels), rounded outwards."""
        step = -(-self.side // _BOX_STEPS)
        return box.left // step, box.top // step, -(-box.right // step), -(-box.bottom // step)

    def cell(self, box: Box) -> tuple[int, int]:
        """Row and column of the cell that holds the middle of the box."""
        width = -(-self.side // CELLS)
        return int((box.top + box.bottom) / 2) // width, int((box.left + box.right) / 2) // width


def make_scene(seed: int, side: int = 112, clutter: float = 0.0) -> Scene:
    """The scene of this seed: always the same pixels.

    Args:
        seed, side: which scene, of so many pixels a side.
        clutter: 0 to 1, how hard it is to see what matters: how much of a photograph the background shows, and how many
            decoys there are.

    Raises:
        ValueError: ``side`` is not one of SIDES, or ``clutter`` not within 0 and 1.
    """
    if side not in SIDES:
        raise ValueError(f"side: expected one of {SIDES}, got {side}")
    if not 0 <= clutter <= 1:
        raise ValueError(f"clutter: expected a number within 0 and 1, got {clutter}")
    rng = np.random.default_rng(seed)
    canvas = background(rng, side)
    # What clutter draws has random numbers of its own: without it nothing changes.
    own = np.random.default_rng((seed, 11)) if clutter else None
    if own is not None:
        canvas += clutter * (cluttered.photograph(own, side, seed) - canvas)
    taken: list[Box] = []
    sign = _draw_sign(rng, canvas, taken) if rng.random() < 0.75 else None
    things: list[Thing] = []
    for _ in range(int(rng.integers(3, 10))):
        thing = _draw_thing(rng, canvas, taken, things, own, clutter)
        if thing is not None:
            things.append(thing)
    for coverage, color in cluttered.decoys(own, clutter) if own is not None else ():
        box = _free_box(own, side, taken, *coverage.shape)
        if box is not None:
            lay_on(canvas, box, coverage, color)
    canvas += rng.standard_normal((side, side)).astype(np.float32)[..., None] * rng.uniform(0, 6)
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), tuple(things), sign)


def background(rng: np.random.Generator, side: int) -> sprites.Array:
    """A part of a texture, ``[side, side, 3]`` float32."""
    bank = sprites.textures(side + sprites.MARGIN)
    top, left = rng.integers(0, 64, 2)
    image = bank[rng.integers(len(bank))][top : top + side, left : left + side]
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.5:
        image = image.transpose(1, 0, 2)
    return image.astype(np.float32)


def _free_box(rng: np.random.Generator, side: int, taken: list[Box], height: int, width: int) -> Box | None:
    """A place at least two pixels away from everything drawn so far; None after 30 tries."""
    for _ in range(30):
        top, left = int(rng.integers(1, side - height)), int(rng.integers(1, side - width))
        bottom, right = top + height, left + width
        if all(
            bottom + 2 <= b.top or b.bottom + 2 <= top or right + 2 <= b.left or b.right + 2 <= left
            for b in taken
        ):
            taken.append(Box(left, top, right, bottom))
            return taken[-1]
    return None


def _draw_sign(rng: np.random.Generator, canvas: sprites.Array, taken: list[Box]) -> Sign:
    height = int(rng.integers(10, 14))
    letters = tuple(int(i) for i in rng.integers(0, len(LETTERS), 3))
    glyphs = [sprites.letter(i, height) for i in letters]
    width = sum(g.shape[1] for g in glyphs) + 2 * _LETTER_GAP + 2 * _SIGN_PAD
    box = _free_box(rng, canvas.shape[0], taken, height + 2 * _SIGN_PAD, width)
    assert box is not None  # the first thing drawn finds room at the first try
    dark = rng.random() < 0.5
    plate = rng.uniform(10, 50, 3) if dark else rng.uniform(205, 250, 3)
    ink = rng.uniform(215, 255, 3) if dark else rng.uniform(0, 45, 3)
    canvas[box.top : box.bottom, box.left : box.right] = plate
    boxes = []
    left, top = box.left + _SIGN_PAD, box.top + _SIGN_PAD
    for coverage in glyphs:
        boxes.append(Box(left, top, left + coverage.shape[1], top + height))
        lay_on(canvas, boxes[-1], coverage, ink)
        left = boxes[-1].right + _LETTER_GAP
    return Sign(letters, box, tuple(boxes))


def _draw_thing(
    rng: np.random.Generator,
    canvas: sprites.Array,
    taken: list[Box],
    things: list[Thing],
    own: np.random.Generator | None,
    clutter: float,
) -> Thing | None:
    shape, color, size = (int(rng.integers(n)) for n in (len(SHAPES), len(COLORS), len(SIZES)))
    if things and rng.random() < 0.45:  # shares an attribute with an earlier one: hard to tell apart
        other = things[rng.integers(len(things))]
        if rng.random() < 0.5:
            shape = other.shape
        else:
            color = other.color
    low, high = SIZES[SIZE_NAMES[size]]
    angle = int(rng.integers(sprites.ANGLES))
    coverage = sprites.glyph(shape, angle, int(rng.integers(low, high + 1)))
    if own is not None and SIZE_NAMES[size] == "large":
        coverage = cluttered.grown(own, coverage, clutter)
    box = _free_box(rng, canvas.shape[0], taken, *coverage.shape)
    if box is None:
        return None
    paint = np.clip(np.array(COLORS[COLOR_NAMES[color]]) + rng.uniform(-14, 14, 3), 0, 255)
    lay_on(canvas, box, coverage, (paint * rng.uniform(0.92, 1.0)).astype(np.float32))
    return Thing(shape, color, size, box, coverage)


def lay_on(canvas: sprites.Array, box: Box, coverage: sprites.Array, color: NDArray[np.floating]) -> None:
    """Paint a glyph into ``canvas``, which is changed."""
    region = canvas[box.top : box.bottom, box.left : box.right]
    region += coverage[..., None] * (color - region)
