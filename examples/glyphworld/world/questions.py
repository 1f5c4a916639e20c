"""Questions about a scene, and their answers. Each family is one function; it returns None where nothing can be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from world.scenes import Box, Scene, Thing
from world.words import COLOR_NAMES, FAMILIES, LETTERS, SHAPES, SIZE_NAMES

_SIGN_SHARE = 0.12  # of the questions for a place that ask for the sign
_TRIES = 8  # a random question may be impossible to ask: how often another is drawn


@dataclass(frozen=True)
class Question:
    """One question: its words, the words of the answer, and the box in pixels of what it is about, if it is one thing."""

    family: str
    words: tuple[str, ...]
    answer: tuple[str, ...]
    box: Box | None = None


def ask(scene: Scene, family: str, rng: np.random.Generator) -> Question | None:
    """A random question of this family, or None if the draw cannot be asked of this scene (ambiguous, or no sign)."""
    return _ASK[family](scene, rng)


def ask_all(scene: Scene, rng: np.random.Generator, boxes: int = 1) -> Iterator[Question]:
    """One question of every family that the scene allows, and ``boxes`` questions for a box."""
    for family in FAMILIES:
        for _ in range(boxes if family == "box" else 1):
            draws = (ask(scene, family, rng) for _ in range(_TRIES))
            question = next((draw for draw in draws if draw is not None), None)
            if question is not None:
                yield question


def _pick(scene: Scene, rng: np.random.Generator) -> Thing | None:
    return scene.things[rng.integers(len(scene.things))] if scene.things else None


def name_of(thing: Thing, size: bool, color: bool, shape: bool) -> tuple[str, ...]:
    """Those of its attributes that are to be said; "object" for an unsaid shape."""
    words = [SIZE_NAMES[thing.size]] if size else []
    words += [COLOR_NAMES[thing.color]] if color else []
    return (*words, SHAPES[thing.shape] if shape else "object")


def refer(scene: Scene, thing: Thing, rng: np.random.Generator) -> tuple[str, ...] | None:
    """Random words that fit this thing alone, or None."""
    unique = []
    for shape, color, size in product((False, True), repeat=3):
        fitting = sum(
            (not shape or t.shape == thing.shape)
            and (not color or t.color == thing.color)
            and (not size or t.size == thing.size)
            for t in scene.things
        )
        if (shape or color) and fitting == 1:
            unique.append((size, color, shape))
    return name_of(thing, *unique[rng.integers(len(unique))]) if unique else None


def _place(scene: Scene, rng: np.random.Generator) -> tuple[tuple[str, ...], Box] | None:
    """What to look for, and where it is."""
    if scene.sign and rng.random() < _SIGN_SHARE:
        return ("sign",), scene.sign.box
    thing = _pick(scene, rng)
    words = refer(scene, thing, rng) if thing else None
    return (words, thing.box) if thing and words else None


def _box(scene: Scene, rng: np.random.Generator) -> Question | None:
    place = _place(scene, rng)
    if place is None:
        return None
    words, box = place
    opening = (("locate", "the"), ("box", "of", "the"))[rng.integers(2)]
    return Question("box", (*opening, *words, "."), tuple(map(str, scene.steps(box))), box)


def _cell(scene: Scene, rng: np.random.Generator) -> Question | None:
    place = _place(scene, rng)
    if place is None:
        return None
    words, box = place
    opening = (("where", "is", "the"), ("find", "the"))[rng.integers(2)]
    row, col = scene.cell(box)
    return Question("cell", (*opening, *words, "?"), ("row", str(row), "col", str(col)), box)


def _at(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _pick(scene, rng)
    if thing is None:
        return None
    row, col = scene.cell(thing.box)
    if sum(scene.cell(t.box) == (row, col) for t in scene.things) > 1:
        return None
    words = ("what", "is", "at", "row", str(row), "col", str(col), "?")
    return Question("at", words, name_of(thing, True, True, True), thing.box)


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _pick(scene, rng)
    if thing is None:
        return None
    named = _attribute(scene, thing, "shape", SHAPES[thing.shape], rng)
    answer = ("it", "is", COLOR_NAMES[thing.color])
    return (
        Question("color", ("what", "color", "is", "the", *named, "?"), answer, thing.box) if named else None
    )


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _pick(scene, rng)
    if thing is None:
        return None
    named = _attribute(scene, thing, "color", COLOR_NAMES[thing.color], rng)
    answer = ("it", "is", "a", SHAPES[thing.shape])
    return Question("shape", ("which", "shape", "is", *named, "?"), answer, thing.box) if named else None


def _attribute(
    scene: Scene, thing: Thing, kind: str, word: str, rng: np.random.Generator
) -> tuple[str, ...] | None:
    """The thing named by one attribute, sometimes with its size; None if that fits others too."""
    with_size = rng.random() < 0.3
    fitting = sum(
        getattr(t, kind) == getattr(thing, kind) and (not with_size or t.size == thing.size)
        for t in scene.things
    )
    if fitting != 1:
        return None
    return (SIZE_NAMES[thing.size], word) if with_size else (word,)


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    kind = rng.integers(3)
    if kind == 0:
        words, number = "objects", len(scene.things)
    else:
        thing = _pick(scene, rng) if scene.things and rng.random() < 0.8 else None
        if thing:
            color, shape = thing.color, thing.shape
        else:
            color, shape = int(rng.integers(len(COLOR_NAMES))), int(rng.integers(len(SHAPES)))
        if kind == 1:
            words, number = f"{COLOR_NAMES[color]} objects", sum(t.color == color for t in scene.things)
        else:
            words, number = f"{SHAPES[shape]} objects", sum(t.shape == shape for t in scene.things)
    return Question("count", ("how", "many", *words.split(), "are", "there", "?"), (str(number), "objects"))


def _exist(scene: Scene, rng: np.random.Generator) -> Question | None:
    there = rng.random() < 0.5
    thing = _pick(scene, rng)
    if thing is None:
        return None
    color, shape = thing.color, thing.shape
    if not there:
        pair = absent(scene, color, shape, rng)
        if pair is None:
            return None
        color, shape = pair
    words = ("is", "there", "a", COLOR_NAMES[color], SHAPES[shape], "?")
    return Question("exist", words, ("yes" if there else "no",), thing.box if there else None)


def absent(scene: Scene, color: int, shape: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """A colour and shape that nothing has together, as close to the given pair as random changes leave it."""
    for _ in range(20):
        if rng.random() < 0.5:
            color = int(rng.integers(len(COLOR_NAMES)))
        else:
            shape = int(rng.integers(len(SHAPES)))
        if not any(t.color == color and t.shape == shape for t in scene.things):
            return color, shape
    return None


def _read(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.sign is None:
        return None
    words = (("what", "does", "the", "sign", "say", "?"), ("read", "the", "word", "."))[rng.integers(2)]
    return Question("read", words, tuple(LETTERS[i] for i in scene.sign.letters), scene.sign.box)


_ASK: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "box": _box,
    "cell": _cell,
    "at": _at,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "exist": _exist,
    "read": _read,
}
