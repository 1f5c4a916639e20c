"""Packed batches: one picture, then as many questions about it as fit, each of which sees the picture and itself.

Some questions may come with notes in front of them, and some of those have the notes only: they do not see the picture.

The picture costs most of a sequence, so it is computed once for many questions. Beside the words to predict, a batch says
what every patch shows: the dense losses learn from it what a handful of answers a picture teaches slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from world.notes import take_notes
from world.questions import Question, ask
from world.scenes import Box, Scene, make_scene
from world.words import FAMILIES, LETTERS, SHAPES

from training.wording import Wording

PATCH = 8
IGNORED = -100  # a label without loss
PATCH_CLASSES = 1 + len(SHAPES) + 1 + len(LETTERS)  # nothing, the shapes, the plate of a sign, the letters
_PLATE = 1 + len(SHAPES)
_FEWEST_PIXELS = 5  # of an object in a patch that is said to show it
_MISSES = 6  # draws that gave no new question, after which a picture gets no more
_BLIND = 0.5  # share of the questions with notes that do not see the picture

# Shares of the families in training. Counting is the hardest and gets the most.
MIX = {"box": 0.18, "cell": 0.12, "at": 0.09, "color": 0.06, "shape": 0.05, "count": 0.35, "exist": 0.09, "read": 0.06}  # fmt: skip

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """B pictures of P patches with T text positions each; everything int64 unless said."""

    images: Tensor  # [B, side, side, 3] uint8
    prefix: Tensor  # [F] tokens in front of every picture
    ids: Tensor  # [B, T] tokens of the questions and answers, one after the other
    labels: Tensor  # [B, T] the next token where it belongs to an answer, else -100
    segment: Tensor  # [B, T] number of the question from 1, 0 = padding
    positions: (
        Tensor  # [B, T] as if each question followed the picture directly; blind ones stand anywhere before
    )
    blind: Tensor  # [B, T] 1 where the question does not see the picture
    patch_class: Tensor  # [B, P] below PATCH_CLASSES
    patch_color: Tensor  # [B, P] 1 + colour, 0 = none
    patch_box: Tensor  # [B, P, 4] corners, as answered, of what the patch shows
    anchor_shape: Tensor  # [B, P] 1 + shape where the middle of an object is, else 0
    anchor_color: Tensor  # [B, P] 1 + colour there, else 0

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def make_batch(
    seeds: Sequence[int], side: int, wording: Wording, text: int = 128, notes: float = 0.0
) -> Batch:
    """The batch of these scenes, the same whenever it is made.

    Args:
        seeds, side: of the scenes.
        wording: how a question is put.
        text: text positions.
        notes: share of the questions that have notes before them.

    Raises:
        ValueError: a question that does not fit into ``text`` positions even alone.
    """
    scenes = [make_scene(seed, side) for seed in seeds]
    packed = [
        _pack(scene, np.random.default_rng((seed, 7)), wording, text, notes)
        for seed, scene in zip(seeds, scenes, strict=True)
    ]
    dense = [_patches(scene) for scene in scenes]
    columns = [*zip(*packed, strict=True), *zip(*dense, strict=True)]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    stacked = (torch.from_numpy(np.stack(column)) for column in columns)
    return Batch(images, torch.tensor(wording.prefix, dtype=torch.int64), *stacked)


def _pack(
    scene: Scene, rng: np.random.Generator, wording: Wording, text: int, notes: float
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """ids, labels, segment, positions, blind of one picture, each ``[text]``."""
    first = len(wording.prefix) + (scene.side // PATCH) ** 2
    ids, segment, blind = np.zeros((3, text), np.int64)
    labels, positions = np.full(text, IGNORED), np.full(text, first)
    seen: set[tuple[str, ...]] = set()
    start = misses = 0
    while misses < _MISSES:
        question = ask(scene, rng.choice(FAMILIES, p=[MIX[family] for family in FAMILIES]), rng)
        alone = False
        if question is not None and notes and rng.random() < notes:
            question, alone = _with_notes(scene, question, rng)
        if question is None or question.words in seen:
            misses += 1
            continue
        words, answer = wording.encode(question)
        length = len(words) + len(answer) - 1
        if length > text:
            raise ValueError(f"text: expected room for every question, got {text} (one takes {length})")
        end = start + length
        if end > text:
            misses += 2  # a shorter one may still fit
            continue
        seen.add(question.words)
        ids[start:end] = [*words, *answer[:-1]]
        labels[end - len(answer) : end] = answer
        segment[start:end] = len(seen)
        # Where pruning leaves the text: behind some of the picture.
        behind = rng.integers(len(wording.prefix), first + 1) if alone else first
        positions[start:end] = behind + np.arange(length)
        blind[start:end] = alone
        start = end
    return ids, labels, segment, positions, blind


def _with_notes(scene: Scene, question: Question, rng: np.random.Generator) -> tuple[Question, bool]:
    """The question behind notes, and whether they have to do."""
    alone = bool(rng.random() < _BLIND)
    words = take_notes(scene, question, rng, telling=alone or bool(rng.random() < 0.5))
    return replace(question, words=(*words, *question.words)), alone


def _patches(scene: Scene) -> tuple[Ints, Ints, Ints, Ints, Ints]:
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
