"""Notes: true sentences about a scene in the world's own words, such as stand in a prompt beside or instead of the picture.

`large yellow flower at row 3 col 5 .`, `sign B X K .`, `there are 2 yellow objects .`: every note ends with a full stop.
"""

from __future__ import annotations

import numpy as np

from world.questions import Question
from world.scenes import Box, Scene, Thing
from world.words import COLOR_NAMES, LETTERS, SHAPES, SIZE_NAMES

Words = tuple[str, ...]

# What is put in: {n} the name, {c} "row 3 col 5", {b} "box 9 11 12 14".
_AT = ("{n} at {c}", "the {n} is at {c}", "at {c} there is a {n}", "{n} {c}")
_IN = ("{n} {b}", "the {n} is in {b}", "{b} there is a {n}", "{n} in {b}")
_BOTH = ("{n} {c} {b}", "the {n} is at {c} {b}", "{n} {b} {c}", "at {c} {b} {n}")
_PLACES = {"cell": _AT, "box": _IN, "both": _BOTH}
_TELLING = {"box": ("box", "both"), "cell": ("cell", "both"), "at": ("cell", "both")}  # kinds with the answer
_EVERYTHING = 0.3  # share of the notes that are of everything
_SAYS = ("sign {l}", "the sign does say {l}", "word {l}", "the word is {l}")
_COUNTS = ("{k} {o}", "there are {k} {o}", "{o} {k}")
_THERE = {True: ("a {o}", "there is a {o}", "yes {o}"), False: ("no {o}", "there is no {o}")}


def name(thing: Thing) -> str:
    """Size, colour and shape."""
    return f"{SIZE_NAMES[thing.size]} {COLOR_NAMES[thing.color]} {SHAPES[thing.shape]}"


def place(scene: Scene, what: str, box: Box, rng: np.random.Generator, kind: str | None = None) -> Words:
    """Where ``what`` is: its cell, its box, or both, as ``kind`` says ("cell", "box", "both"; None = any)."""
    wordings = _PLACES[kind or str(rng.choice(list(_PLACES)))]
    row, col = scene.cell(box)
    corners = " ".join(map(str, scene.steps(box)))
    return _say(wordings, rng, n=what, c=f"row {row} col {col}", b=f"box {corners}")


def says(scene: Scene, rng: np.random.Generator) -> Words:
    """What the sign, which must be there, says."""
    assert scene.sign is not None
    return _say(_SAYS, rng, l=" ".join(LETTERS[i] for i in scene.sign.letters))


def about(scene: Scene, question: Question, rng: np.random.Generator) -> Words:
    """A note that tells the answer to ``question``, though not always that alone."""
    if question.family == "count":  # how many ... are there ?
        return _say(_COUNTS, rng, k=question.answer[0], o=" ".join(question.words[2:-3]))
    if question.family == "exist":  # is there a ... ?
        there = question.answer == ("yes",)
        if not there or rng.random() < 0.5:
            return _say(_THERE[there], rng, o=" ".join(question.words[3:-1]))
    if question.family == "read":
        return says(scene, rng)
    assert question.box is not None
    things = [thing for thing in scene.things if thing.box == question.box]
    kind = str(rng.choice(_TELLING.get(question.family, list(_PLACES))))
    return place(scene, name(things[0]) if things else "sign", question.box, rng, kind)


def everything(scene: Scene, rng: np.random.Generator, kind: str = "cell") -> list[Words]:
    """A note of every thing and two of the sign, where it is and what it says, in a random order."""
    notes = [place(scene, name(thing), thing.box, rng, kind) for thing in scene.things]
    if scene.sign:
        notes += [says(scene, rng), place(scene, "sign", scene.sign.box, rng, kind)]
    return [notes[i] for i in rng.permutation(len(notes))]


def some(scene: Scene, rng: np.random.Generator, number: int) -> list[Words]:
    """Up to ``number`` notes, each about another thing or what the sign says, whatever is asked."""
    notes = [place(scene, name(thing), thing.box, rng) for thing in scene.things]
    notes += [says(scene, rng)] if scene.sign else []
    return [notes[i] for i in rng.permutation(len(notes))[:number]]


def take_notes(scene: Scene, question: Question, rng: np.random.Generator, telling: bool) -> Words:
    """Notes to stand before a question: of everything, or a few, with the answer among them where ``telling``."""
    if telling and rng.random() < _EVERYTHING:
        kind = str(rng.choice(_TELLING.get(question.family, list(_PLACES))))
        notes = everything(scene, rng, kind)
    else:
        notes = some(scene, rng, int(rng.integers(0 if telling else 1, 4)))
        if telling:
            notes.insert(int(rng.integers(len(notes) + 1)), about(scene, question, rng))
    return tuple(word for note in notes for word in note)


def _say(wordings: Words, rng: np.random.Generator, **parts: str) -> Words:
    return (*str(rng.choice(wordings)).format(**parts).split(), ".")
