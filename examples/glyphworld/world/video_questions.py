"""Questions about a clip, and their answers. Each family is one function; it returns None where nothing can be asked.

Words that fit two things which are ever seen in the clip are never used, whenever the two are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from world.questions import absent, name_of, refer
from world.scenes import Box
from world.video_words import FAMILIES
from world.videos import DIRECTIONS, FRAMES, Actor, Clip, cell
from world.words import COLOR_NAMES, SHAPES

Words = tuple[str, ...]
Rng = np.random.Generator

_TRIES = 8  # a random question may be impossible to ask: how often another is drawn
_RARE = 0.75  # share of the questions that ask for what is not so in every clip: motion, a first or last frame in between


@dataclass(frozen=True)
class ClipQuestion:
    """One question.

    Attributes:
        family, words, answer: as of a question about a picture.
        seen: frames and boxes in pixels of the one thing it is about, as far as they show the answer; () if it is about
            several or none.
    """

    family: str
    words: Words
    answer: Words
    seen: tuple[tuple[int, Box], ...] = ()


def ask_clip(clip: Clip, family: str, rng: Rng) -> ClipQuestion | None:
    """A random question of this family, or None if the draw cannot be asked of this clip."""
    return _ASK[family](clip, rng)


def ask_all(clip: Clip, rng: Rng) -> Iterator[ClipQuestion]:
    """One question of every family that the clip allows."""
    for family in FAMILIES:
        draws = (ask_clip(clip, family, rng) for _ in range(_TRIES))
        question = next((draw for draw in draws if draw is not None), None)
        if question is not None:
            yield question


def _any(things: Sequence[Actor], rng: Rng) -> Actor | None:
    return things[rng.integers(len(things))] if things else None


def _some(clip: Clip, wanted: Callable[[Actor], bool], rng: Rng) -> tuple[Actor, Words] | None:
    """One thing and words that fit it alone; mostly one that is ``wanted``, if there is one."""
    rare = [thing for thing in clip.things if wanted(thing)]
    thing = _any(rare if rare and rng.random() < _RARE else clip.things, rng)
    words = refer(clip, thing, rng) if thing else None
    return (thing, words) if thing and words else None


def _shown(thing: Actor, *times: int) -> tuple[tuple[int, Box], ...]:
    boxes = ((time, thing.box(time)) for time in times)
    return tuple((time, box) for time, box in boxes if box is not None)


def _spot(box: Box) -> Words:
    row, col = cell(box)
    return "row", str(row), "col", str(col)


def _where(clip: Clip, rng: Rng) -> ClipQuestion | None:
    found = _some(clip, lambda thing: thing.way is not None, rng)
    if found is None:
        return None
    thing, words = found
    time = int(rng.integers(thing.first, thing.last + 1))
    opening = (("where", "is", "the"), ("find", "the"))[rng.integers(2)]
    shown = _shown(thing, time)
    return ClipQuestion("where", (*opening, *words, "at", "time", str(time), "?"), _spot(shown[0][1]), shown)


def _place(clip: Clip, rng: Rng) -> ClipQuestion | None:
    thing = _any([thing for thing in clip.things if thing.way is None], rng)
    words = refer(clip, thing, rng) if thing else None
    if thing is None or words is None:
        return None
    opening = (("where", "is", "the"), ("find", "the"))[rng.integers(2)]
    shown = _shown(thing, *range(FRAMES))
    return ClipQuestion("place", (*opening, *words, "?"), _spot(thing.start), shown)


def _at(clip: Clip, rng: Rng) -> ClipQuestion | None:
    thing = _any(clip.things, rng)
    if thing is None:
        return None
    time = int(rng.integers(thing.first, thing.last + 1))
    shown = _shown(thing, time)
    here = cell(shown[0][1])
    if sum(box is not None and cell(box) == here for box in (t.box(time) for t in clip.things)) > 1:
        return None
    words = ("what", "is", "at", *_spot(shown[0][1]), "at", "time", str(time), "?")
    return ClipQuestion("at", words, name_of(thing, True, True, True), shown)


def _when(clip: Clip, rng: Rng) -> ClipQuestion | None:
    first = rng.random() < 0.5
    rare = (lambda thing: thing.first > 0) if first else (lambda thing: thing.last < FRAMES - 1)
    found = _some(clip, rare, rng)
    if found is None:
        return None
    thing, words = found
    time = thing.first if first else thing.last
    asked = ("when", "is", "the", *words, "first" if first else "last", "seen", "?")
    return ClipQuestion("when", asked, ("time", str(time)), _shown(thing, time))


def _counted(clip: Clip, things: Sequence[Actor], rng: Rng) -> tuple[Words, int]:
    """What to count, ``... objects``, and how many of ``things`` are that."""
    kind = rng.integers(3)
    like = _any(clip.things, rng)
    if kind == 0 or like is None:
        return ("objects",), len(things)
    if kind == 1:
        return (COLOR_NAMES[like.color], "objects"), sum(t.color == like.color for t in things)
    return (SHAPES[like.shape], "objects"), sum(t.shape == like.shape for t in things)


def _total(clip: Clip, rng: Rng) -> ClipQuestion | None:
    what, number = _counted(clip, clip.things, rng)
    return ClipQuestion("total", ("how", "many", *what, "are", "there", "?"), (str(number), "objects"))


def _count(clip: Clip, rng: Rng) -> ClipQuestion | None:
    time = int(rng.integers(FRAMES))
    here = [thing for thing in clip.things if thing.box(time) is not None]
    what, number = _counted(clip, here, rng)
    words = ("how", "many", *what, "are", "there", "at", "time", str(time), "?")
    return ClipQuestion("count", words, (str(number), "objects"))


def _way(clip: Clip, rng: Rng) -> ClipQuestion | None:
    thing = _any([thing for thing in clip.things if thing.way is not None], rng)
    words = refer(clip, thing, rng) if thing else None
    if thing is None or thing.way is None or words is None:
        return None
    asked = ("where", "does", "the", *words, "move", "?")
    return ClipQuestion("way", asked, (thing.way,), _shown(thing, *range(FRAMES)))


def _mover(clip: Clip, rng: Rng) -> ClipQuestion | None:
    """Of what moves this way, or of what moves at all, there must be one only."""
    way = (None, *DIRECTIONS)[rng.integers(1 + len(DIRECTIONS))]
    movers = [thing for thing in clip.things if thing.way is not None and way in (None, thing.way)]
    if len(movers) != 1:
        return None
    words = ("what", "does", "move", *(() if way is None else (way,)), "?")
    return ClipQuestion(
        "mover", words, name_of(movers[0], True, True, True), _shown(movers[0], *range(FRAMES))
    )


def _exist(clip: Clip, rng: Rng) -> ClipQuestion | None:
    """Half are there; of the others, half are there at other times where there are such."""
    time, thing = int(rng.integers(FRAMES)), None
    here = [thing for thing in clip.things if thing.box(time) is not None]
    there = bool(here) and rng.random() < 0.5
    kinds = {(thing.color, thing.shape) for thing in here}
    others = [thing for thing in clip.things if (thing.color, thing.shape) not in kinds]
    if there:
        thing = here[rng.integers(len(here))]
        color, shape = thing.color, thing.shape
    elif others and rng.random() < 0.5:
        other = others[rng.integers(len(others))]
        color, shape = other.color, other.shape
    else:
        like = clip.things[rng.integers(len(clip.things))]
        pair = absent(clip, like.color, like.shape, rng)
        if pair is None:
            return None
        color, shape = pair
    words = ("is", "there", "a", COLOR_NAMES[color], SHAPES[shape], "at", "time", str(time), "?")
    alone = thing is not None and sum((t.color, t.shape) == (color, shape) for t in here) == 1
    return ClipQuestion("exist", words, ("yes" if there else "no",), _shown(thing, time) if alone else ())


_ASK: dict[str, Callable[[Clip, Rng], ClipQuestion | None]] = {
    "where": _where,
    "place": _place,
    "at": _at,
    "when": _when,
    "total": _total,
    "count": _count,
    "way": _way,
    "mover": _mover,
    "exist": _exist,
}
