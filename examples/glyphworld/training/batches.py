"""Packed batches: one picture, then as many questions about it as fit, each of which sees the picture and itself.

The picture costs most of a sequence, so it is computed once for many questions. Beside the words to predict, a batch says
what every patch shows: the dense losses learn from it what a handful of answers a picture teaches slowly.

Notes, where there are any, stand in front of the questions, and all of these see them: behind a picture, or without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, zip_longest
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from world.notes import Words, complete, take_notes
from world.questions import Question, ask
from world.scenes import Box, Scene, make_scene
from world.words import FAMILIES, LETTERS, SHAPES

from training.wording import Wording

PATCH = 8
IGNORED = -100  # a label without loss
PATCH_CLASSES = 1 + len(SHAPES) + 1 + len(LETTERS)  # nothing, the shapes, the plate of a sign, the letters
_PLATE = 1 + len(SHAPES)
_FEWEST_PIXELS = 5  # of an object in a patch that is said to show it
_TOLD_MIX = dict.fromkeys(FAMILIES, 1 / len(FAMILIES))  # nothing that is told is hard to see
_SIZES = (1, 1, 2, 2, 4, 8)  # questions which the notes of a document answer
NOTES = -1  # segment of the notes, which every question of the document sees
_NOTED = 0.5  # share of the pictures with notes where there are notes at all
_ELSEWHERE = 0.6  # share of these whose notes and questions are about another scene: what is written counts
_FAR = 1_000_000_000  # seeds of the scenes that are told, not shown
_MISSES = 6  # draws that gave no new question, after which a picture gets no more

# Shares of the families in training. Counting is the hardest and gets the most.
MIX = {"box": 0.18, "cell": 0.12, "at": 0.09, "color": 0.06, "shape": 0.05, "count": 0.35, "exist": 0.09, "read": 0.06}  # fmt: skip

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """B rows of T text positions; everything int64 unless said."""

    prefix: Tensor  # [F] tokens in front of every picture
    ids: Tensor  # [B, T] tokens of the notes, if any, then of the questions and answers, one after the other
    labels: Tensor  # [B, T] the next token where it belongs to an answer, else -100
    segment: Tensor  # [B, T] number of the question from 1, 0 = padding, NOTES
    document: Tensor  # [B, T] number of the notes and all questions about them from 1, one behind a picture; 0 = padding
    positions: Tensor  # [B, T] as if each question followed the picture, or the notes, directly

    def to(self, device: torch.device) -> Self:
        """The same on ``device``."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Batch(Text):
    """The text behind B pictures of P patches, the pictures, and what they show."""

    images: Tensor  # [B, side, side, 3] uint8
    patch_class: Tensor  # [B, P] below PATCH_CLASSES
    patch_color: Tensor  # [B, P] 1 + colour, 0 = none
    patch_box: Tensor  # [B, P, 4] corners, as answered, of what the patch shows
    anchor_shape: Tensor  # [B, P] 1 + shape where the middle of an object is, else 0
    anchor_color: Tensor  # [B, P] 1 + colour there, else 0


def make_batch(
    seeds: Sequence[int],
    side: int,
    wording: Wording,
    text: int = 128,
    notes: bool = False,
    clutter: float = 0.0,
) -> Batch:
    """The batch of these scenes, the same whenever it is made.

    Args:
        seeds, side: of the scenes.
        wording: how a question is put.
        text: text positions.
        notes: whether some pictures have notes behind them.
        clutter: of half of the scenes; the others have less, evenly spread down to none.

    Raises:
        ValueError: a question that does not fit into ``text`` positions even alone.
    """
    scenes = [make_scene(seed, side, clutter * difficulty(seed)) for seed in seeds]
    packed = [_row(seed, scene, wording, text, notes) for seed, scene in zip(seeds, scenes, strict=True)]
    dense = [show_patches(scene) for scene in scenes]
    columns = [*zip(*packed, strict=True), *zip(*dense, strict=True)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    ids, labels, segment, document, positions, *dense = (
        torch.from_numpy(np.stack(column)) for column in columns
    )
    return Batch(torch.tensor(wording.prefix), ids, labels, segment, document, positions, images, *dense)


def make_text(seeds: Sequence[int], side: int, wording: Wording, text: int = 192) -> Text:
    """Notes about scenes that are not shown, and questions which they answer; as ``make_batch``.

    A row is filled with documents, short ones and long ones: copying from long ones alone is not learned.
    """
    rows = []
    for seed in seeds:
        rng, row = np.random.default_rng((seed, 8)), Row(wording, text)
        while True:
            scene = make_scene(_FAR + int(rng.integers(_FAR)), side)
            size = int(rng.choice(_SIZES))
            asked = [*_ask(scene, rng, size, _TOLD_MIX)]
            notes = take_notes(scene, asked, rng, others=int(rng.integers(size)))
            # Where pruning leaves the text: behind some of the picture.
            first = len(wording.prefix) + int(rng.integers((side // PATCH) ** 2 + 1))
            if not row.tell(notes, first) or not all(map(row.ask, _alternate(complete(notes, rng), asked))):
                break
        rows.append(row.columns())
    stacked = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return Text(torch.tensor(wording.prefix), *stacked)


def difficulty(seed: int) -> float:
    """1 for half of the scenes, evenly spread between 0 and 1 for the others."""
    return min(1.0, 2 * np.random.default_rng((seed, 12)).random())


def _row(seed: int, scene: Scene, wording: Wording, text: int, notes: bool) -> tuple[Ints, ...]:
    """The text behind one picture; notes, where there are any, answer some of the questions.

    Behind a picture that shows all that is asked notes would only be ignored: some tell of another scene, and only that is
    asked then.
    """
    rng, row = np.random.default_rng((seed, 7)), Row(wording, text)
    first = len(wording.prefix) + (scene.side // PATCH) ** 2
    told: list[Question] = []
    noted: list[Words] = []
    more = True
    if notes and rng.random() < _NOTED:
        size, about = int(rng.choice(_SIZES)), scene
        if rng.random() < _ELSEWHERE:
            about, more = make_scene(_FAR + int(rng.integers(_FAR)), scene.side), False
        told = [*_ask(about, rng, size, MIX if more else _TOLD_MIX)]
        noted = take_notes(about, told, rng, others=int(rng.integers(size)))
    if not row.tell(noted, first):
        raise ValueError(f"text: expected room for all notes, got {text}")
    misses = 0
    for question in chain(told, _ask(scene, rng) if more else ()):
        if not row.ask(question):
            misses += 2  # a shorter one may still fit
        if misses >= _MISSES:
            break
    return row.columns()


def _alternate(*several: Iterable[Question]) -> Iterator[Question]:
    """The first ones of all, the second ones, ...; to the end of the longest."""
    for some in zip_longest(*several):
        yield from filter(None, some)


def _ask(
    scene: Scene, rng: np.random.Generator, number: int | None = None, mix: Mapping[str, float] = MIX
) -> Iterator[Question]:
    """Different questions, until there are so many or too many draws gave no new one."""
    seen: set[Words] = set()
    misses = 0
    while misses < _MISSES and len(seen) != number:
        question = ask(scene, rng.choice(FAMILIES, p=[mix[family] for family in FAMILIES]), rng)
        if question is None or question.words in seen:
            misses += 1
            continue
        seen.add(question.words)
        yield question


class Row:
    """One row of text while it is filled."""

    def __init__(self, wording: Wording, text: int) -> None:
        self._wording, self._text = wording, text
        self._ids, self._segment, self._document, self._positions = np.zeros((4, text), np.int64)
        self._labels = np.full(text, IGNORED)
        self._end = self._questions = self._documents = self._first = 0

    def columns(self) -> tuple[Ints, ...]:
        """ids, labels, segment, document, positions, each ``[text]``."""
        return self._ids, self._labels, self._segment, self._document, self._positions

    def tell(self, notes: Sequence[Words], first: int) -> bool:
        """Begin a document of these notes at position ``first``; False if there is no room."""
        ids = self._wording.tokens([word for note in notes for word in note])
        if self._end + len(ids) > self._text:
            return False
        self._documents += 1
        self._add(ids, NOTES, first)
        self._first = first + len(ids)
        return True

    def ask(self, question: Question) -> bool:
        """Add a question about the document; False if there is no room.

        Raises:
            ValueError: it would not fit into an empty row.
        """
        words, answer = self._wording.encode(question)
        ids = [*words, *answer[:-1]]
        if len(ids) > self._text:
            expected = "text: expected room for every question"
            raise ValueError(f"{expected}, got {self._text} (one takes {len(ids)})")
        if self._end + len(ids) > self._text:
            return False
        self._questions += 1
        self._add(ids, self._questions, self._first)
        self._labels[self._end - len(answer) : self._end] = answer
        return True

    def _add(self, ids: list[int], segment: int, first: int) -> None:
        here = slice(self._end, self._end + len(ids))
        self._ids[here], self._segment[here], self._document[here] = ids, segment, self._documents
        self._positions[here] = first + np.arange(len(ids))
        self._end += len(ids)


def show_patches(scene: Scene) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """patch_class, patch_color, patch_box, anchor_shape, anchor_color of one picture."""
    grid = scene.side // PATCH
    kind, color, anchor_shape, anchor_color = np.zeros((4, grid, grid), np.int64)
    corners = np.zeros((grid, grid, 4), np.int64)
    most = np.full((grid, grid), float(_FEWEST_PIXELS))  # pixels of what a patch shows so far

    def show(box: Box, solid: NDArray[np.bool_], label: int, tint: int, whole: Box) -> None:
        pixels = np.zeros((scene.side, scene.side), np.int64)
        pixels[box.top : box.bottom, box.left : box.right] = solid
        pixels = pixels.reshape(grid, PATCH, grid, PATCH).sum((1, 3))
        here = pixels > most
        most[here], kind[here], color[here], corners[here] = pixels[here], label, tint, scene.steps(whole)

    if scene.sign:
        plate = scene.sign.box
        show(plate, _solid(plate), _PLATE, 0, plate)
        most[:] = _FEWEST_PIXELS  # letters lie on the plate and win over it
        for letter, box in zip(scene.sign.letters, scene.sign.letter_boxes, strict=True):
            show(box, _solid(box), _PLATE + 1 + letter, 0, plate)
    for thing in scene.things:
        box = thing.box
        show(box, thing.coverage > 0.5, 1 + thing.shape, 1 + thing.color, box)
        middle = (box.top + box.bottom) // 2 // PATCH, (box.left + box.right) // 2 // PATCH
        anchor_shape[middle], anchor_color[middle] = 1 + thing.shape, 1 + thing.color
    return kind.ravel(), color.ravel(), corners.reshape(-1, 4), anchor_shape.ravel(), anchor_color.ravel()


def _solid(box: Box) -> NDArray[np.bool_]:
    return np.ones((box.bottom - box.top, box.right - box.left), bool)
