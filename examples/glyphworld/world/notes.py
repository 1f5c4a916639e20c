"""Notes: true sentences about a scene in the world's own words, such as stand in a prompt beside or instead of the picture.

`large yellow flower at row 3 col 5 .`, `sign B X K .`, `there are 2 yellow objects .`: every note ends with a full stop.
Each has several wordings; where no random numbers are given it has the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from world.questions import Question
from world.scenes import Box, Scene, Thing
from world.words import COLOR_NAMES, LETTERS, SHAPES, SIZE_NAMES

Words = tuple[str, ...]
Rng = np.random.Generator

# What is put in: {n} the name, {c} "row 3 col 5", {b} "box 9 11 12 14".
_PLACES = {
    "both": ("{n} {c} {b}", "the {n} is at {c} {b}", "{n} {b} {c}", "at {c} {b} {n}"),
    "cell": ("{n} {c}", "{n} at {c}", "the {n} is at {c}", "at {c} there is a {n}"),
    "box": ("{n} {b}", "the {n} is in {b}", "{b} there is a {n}", "{n} in {b}"),
}
_TELLING = {"box": ("both", "box"), "cell": ("both", "cell"), "at": ("both", "cell")}  # kinds with the answer
_SAYS = ("sign {l}", "the sign does say {l}", "word {l}", "the word is {l}")
_COUNTS = ("{k} {o}", "there are {k} {o}", "{o} {k}")
_THERE = {True: ("a {o}", "there is a {o}", "yes {o}"), False: ("no {o}", "there is no {o}")}
_MANY, _EVERYTHING = 6, 0.5  # notes from which on, and share in which, they are of everything


def name(thing: Thing) -> str:
    """Size, colour and shape."""
    return f"{SIZE_NAMES[thing.size]} {COLOR_NAMES[thing.color]} {SHAPES[thing.shape]}"


def place(scene: Scene, what: str, box: Box, rng: Rng | None = None, kind: str | None = None) -> Words:
    """Where ``what`` is: its cell, its box, or both, as ``kind`` says ("cell", "box", "both"; None = any)."""
    row, col = scene.cell(box)
    corners = " ".join(map(str, scene.steps(box)))
    wordings = _PLACES[kind or _any(tuple(_PLACES), rng)]
    return _say(wordings, rng, n=what, c=f"row {row} col {col}", b=f"box {corners}")


def says(scene: Scene, rng: Rng | None = None) -> Words:
    """What the sign, which must be there, says."""
    assert scene.sign is not None
    return _say(_SAYS, rng, l=" ".join(LETTERS[i] for i in scene.sign.letters))


def about(scene: Scene, question: Question, rng: Rng | None = None) -> Words:
    """A note that tells the answer to ``question``, though not always that alone."""
    if question.family == "count":  # how many ... are there ?
        return _say(_COUNTS, rng, k=question.answer[0], o=" ".join(question.words[2:-3]))
    if question.family == "read":
        return says(scene, rng)
    if question.family == "exist":  # is there a ... ?
        there = question.answer == ("yes",)
        if not there or (rng is not None and rng.random() < 0.5):
            return _say(_THERE[there], rng, o=" ".join(question.words[3:-1]))
    assert question.box is not None
    things = [thing for thing in scene.things if thing.box == question.box]
    kind = _any(_TELLING.get(question.family, tuple(_PLACES)), rng)
    return place(scene, name(things[0]) if things else "sign", question.box, rng, kind)


def everything(scene: Scene, rng: Rng | None = None, kind: str = "cell") -> list[Words]:
    """A note of every thing and two of the sign, what it says and where it is; shuffled if there is an ``rng``."""
    notes = [says(scene, rng), place(scene, "sign", scene.sign.box, rng, kind)] if scene.sign else []
    things = sorted(scene.things, key=lambda thing: scene.cell(thing.box))
    notes += [place(scene, name(thing), thing.box, rng, kind) for thing in things]
    return notes if rng is None else [notes[i] for i in rng.permutation(len(notes))]


def some(scene: Scene, rng: Rng, number: int) -> list[Words]:
    """Up to ``number`` notes, each about another thing or what the sign says, whatever is asked."""
    notes = [place(scene, name(thing), thing.box, rng) for thing in scene.things]
    notes += [says(scene, rng)] if scene.sign else []
    return [notes[i] for i in rng.permutation(len(notes))[:number]]


def take_notes(scene: Scene, questions: Sequence[Question], rng: Rng, others: int) -> list[Words]:
    """Notes which answer all these questions, in a random order: one a question and some others, or of everything.

    Everything is told only where about as many notes are asked for.
    """
    if len(questions) >= _MANY and rng.random() < _EVERYTHING:
        return everything(scene, rng, "both")
    notes = [about(scene, question, rng) for question in questions] + some(scene, rng, others)
    return [notes[i] for i in rng.permutation(len(notes))]


def complete(notes: Sequence[Words], rng: Rng) -> Iterator[Question]:
    """Asks for the rest of each of these notes, in a random order: what a reader learns first."""
    for i in rng.permutation(len(notes)):
        cut = int(rng.integers(1, len(notes[i]) - 1))
        yield Question("complete", notes[i][:cut], notes[i][cut:])


def _any(choices: Words, rng: Rng | None) -> str:
    return choices[0] if rng is None else str(rng.choice(choices))


def _say(wordings: Words, rng: Rng | None, **parts: str) -> Words:
    return (*_any(wordings, rng).format(**parts).split(), ".")
