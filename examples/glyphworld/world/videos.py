"""A clip by its seed: 8 frames of a background that never changes and 2 to 5 glyphs that rest, move, appear or leave.

Half of what pruning methods for videos rely on is that most of a frame is in the one before: some clips are calm, nearly
every glyph of them rests and stays, and some are busy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from world import sprites
from world.scenes import CELLS, Box, Scene, Thing, background, lay_on
from world.words import COLOR_NAMES, COLORS, SHAPES, SIZE_NAMES, SIZES

FRAMES = 8
SIDE = 112
CELL = SIDE // CELLS  # pixels
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""By name: how a step changes row and column."""

_STREAM = 21  # of a seed's random numbers: another than that of the scene with this seed
_CALM = 0.4  # share of the clips that are calm
_MOVE = {True: 0.15, False: 0.65}  # share of the glyphs that move, by whether the clip is calm
_STAY = {True: 0.85, False: 0.45}  # share of those that are there from the first frame to the last
_LIKE = 0.45  # share of those that have an attribute in common with an earlier one
_SHORTEST = 3  # frames in which a glyph is seen
_FAR = 24  # pixels that one moves at least, a cell and a half
_FASTEST = 16  # pixels from a frame to the next
_GAP = 2  # pixels between two of them
_TRIES = 30  # for a place or a path


@dataclass(frozen=True)
class Actor:
    """One glyph: indices into SHAPES, COLOR_NAMES and SIZE_NAMES, and where it is when.

    Attributes:
        first, last: the frames in which it is seen, both included.
        start: its box in the first of them.
        step: by how many pixels its row and column change from a frame to the next.
        coverage, paint: its pixels, ``[h, w]`` in 0..1, and its colour ``[3]``.
    """

    shape: int
    color: int
    size: int
    first: int
    last: int
    start: Box
    step: tuple[int, int]
    coverage: sprites.Array
    paint: NDArray[np.floating]

    def box(self, time: int) -> Box | None:
        """Where it is in frame ``time``; None where it is not seen."""
        if not self.first <= time <= self.last:
            return None
        down, right = (pixels * (time - self.first) for pixels in self.step)
        left, top = self.start.left + right, self.start.top + down
        return Box(left, top, left + self.coverage.shape[1], top + self.coverage.shape[0])

    @property
    def way(self) -> str | None:
        """The name of the direction in which it moves; None if it rests."""
        signs = tuple(map(np.sign, self.step))
        return next((name for name, way in DIRECTIONS.items() if way == signs), None)


@dataclass(frozen=True)
class Clip:
    """The frames ``[8, 112, 112, 3]`` uint8 and everything that is ever seen in them."""

    frames: NDArray[np.uint8]
    things: tuple[Actor, ...]

    def scene(self, time: int) -> Scene:
        """One frame, as if it were a picture."""
        here = [(actor, actor.box(time)) for actor in self.things]
        seen = (Thing(a.shape, a.color, a.size, box, a.coverage) for a, box in here if box is not None)
        return Scene(self.frames[time], tuple(seen), None)


def cell(box: Box) -> tuple[int, int]:
    """Row and column of the cell that holds the middle of the box: of the visual token, too."""
    return int((box.top + box.bottom) / 2) // CELL, int((box.left + box.right) / 2) // CELL


def make_clip(seed: int) -> Clip:
    """The clip of this seed: always the same pixels."""
    rng = np.random.default_rng((seed, _STREAM))
    canvas = background(rng, SIDE)
    canvas += rng.standard_normal((SIDE, SIDE)).astype(np.float32)[..., None] * rng.uniform(0, 6)
    calm, wanted = bool(rng.random() < _CALM), int(rng.integers(2, 6))
    things: list[Actor] = []
    for _ in range(2 * wanted):  # some find no room
        if len(things) < wanted:
            actor = _draw(rng, things, calm)
            things += [] if actor is None else [actor]
    frames = np.repeat(canvas[None], FRAMES, 0)
    for actor in things:
        for time in range(actor.first, actor.last + 1):
            lay_on(frames[time], actor.box(time), actor.coverage, actor.paint)
    return Clip(np.clip(frames, 0, 255).astype(np.uint8), tuple(things))


def _draw(rng: np.random.Generator, things: list[Actor], calm: bool) -> Actor | None:
    """One that keeps its distance from all others at all times; None after so many tries."""
    shape, color, size = (int(rng.integers(n)) for n in (len(SHAPES), len(COLORS), len(SIZES)))
    if things and rng.random() < _LIKE:  # hard to tell apart
        other = things[rng.integers(len(things))]
        if rng.random() < 0.5:
            shape = other.shape
        else:
            color = other.color
    low, high = SIZES[SIZE_NAMES[size]]
    coverage = sprites.glyph(shape, int(rng.integers(sprites.ANGLES)), int(rng.integers(low, high + 1)))
    paint = np.clip(np.array(COLORS[COLOR_NAMES[color]]) + rng.uniform(-14, 14, 3), 0, 255)
    first, last = (0, FRAMES - 1) if rng.random() < _STAY[calm] else _life(rng)
    moves = rng.random() < _MOVE[calm]
    for _ in range(_TRIES):
        path = _path(rng, coverage.shape, last - first, moves)
        actor = Actor(shape, color, size, first, last, *path, coverage, paint)
        if all(_apart(actor, other) for other in things):
            return actor
    return None


def _life(rng: np.random.Generator) -> tuple[int, int]:
    """First and last frame: it appears, leaves, or both."""
    while True:
        first, last = sorted(int(i) for i in rng.integers(0, FRAMES, 2))
        if _SHORTEST - 1 <= last - first < FRAMES - 1:
            return first, last


def _path(
    rng: np.random.Generator, shape: tuple[int, ...], steps: int, moves: bool
) -> tuple[Box, tuple[int, int]]:
    """A start and a step with which a glyph of ``shape`` stays inside for so many steps."""
    height, width = shape
    down, right = (0, 0)
    if moves:
        down, right = list(DIRECTIONS.values())[rng.integers(len(DIRECTIONS))]
        room = SIDE - 2 - (height if down else width)
        pixels = int(rng.integers(-(-_FAR // steps), min(_FASTEST, room // steps) + 1))
        down, right = down * pixels, right * pixels
    corner = []
    for length, step in ((height, down), (width, right)):
        travel = step * steps
        corner.append(int(rng.integers(1 + max(0, -travel), SIDE - length - max(0, travel))))
    top, left = corner
    return Box(left, top, left + width, top + height), (down, right)


def _apart(one: Actor, other: Actor) -> bool:
    """Whether the two never meet."""
    for time in range(FRAMES):
        a, b = one.box(time), other.box(time)
        if a is None or b is None:
            continue
        beside = a.right + _GAP <= b.left or b.right + _GAP <= a.left
        if not (beside or a.bottom + _GAP <= b.top or b.bottom + _GAP <= a.top):
            return False
    return True
