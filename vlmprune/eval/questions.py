"""Reads a folder of questions: ``questions.jsonl``, one JSON object a line, and the images or clips it names."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from vlmprune.errors import InputError, check, check_known
from vlmprune.images import open_clip, open_rgb

FILE = "questions.jsonl"
FIELDS = ("id", "family", "prompt", "answer")
KINDS = ("image", "video")
LABELS = ("family", "answer")
Region = tuple[float, float, float, float]
"""Left, top, right, bottom of a part of an image, as shares of its width and height."""


@dataclass(frozen=True)
class Question:
    """One question about one image, or about one clip.

    Attributes:
        id: its name, unique in the folder.
        image: the image file; of a clip the animation, or the folder of its frames.
        family: what kind of question it is; accuracy is told per family.
        prompt: what is asked; with the placeholder token of an image (a video) in it, taken literally.
        answer: the true answer. Four whole numbers are a box ``x1 y1 x2 y2``.
        box: where in the image the answer is seen, ``x1 y1 x2 y2`` in its pixels; None = not one place, or not known.
        size: width and height of the upright image, or of a clip's frames, in pixels.
        kind: which of both it is about.
    """

    id: str
    image: Path
    family: str
    prompt: str
    answer: str
    box: Region | None = None
    size: tuple[int, int] = (1, 1)
    kind: Literal["image", "video"] = "image"

    def pictures(self) -> list[Image]:
        """The image, or all frames of the clip. Raises InputError for what cannot be read."""
        return (
            [open_rgb(self.image, "questions")]
            if self.kind == "image"
            else open_clip(self.image, "questions")
        )

    @property
    def region(self) -> Region | None:
        """The box as shares of the image, cut off at its edges."""
        if self.box is None:
            return None
        x1, y1, x2, y2 = (
            min(max(at / side, 0.0), 1.0) for at, side in zip(self.box, self.size * 2, strict=True)
        )
        return x1, y1, x2, y2


def read_questions(folder: Path, families: Sequence[str] = (), *, labelled: bool = True) -> list[Question]:
    """The questions of these families, or of all; in the order of the file.

    Where they need not be ``labelled``, a line may lack ``answer`` and ``family``, which are "" then.

    Answers that are boxes are scored in the units of the answer. A line's ``box`` may say besides, in pixels, where in
    the image its answer is seen; only the oracle looks at it, and at whether it fits. Every image is read in full once,
    so that a damaged one is known by name before the first question is asked and not in the middle of the night.
    A line about a clip has ``video`` in place of ``image``: an animation (GIF, WebP, PNG), or a folder of frames.

    Raises:
        InputError: no such folder or file, a malformed line (with its number), an image that is not there or cannot be
            read, two questions of one id, a family no question has, or questions about images and about clips.
    """
    path = folder / FILE
    check(path.is_file(), "questions", f"a folder with a {FILE}", repr(str(folder)))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got {error.reason}") from error
    found = [_read(text, n, folder, labelled) for n, text in enumerate(lines, 1) if text.strip()]
    check(bool(found), "questions", f"at least one line in {path}", "none")
    again = [name for name, times in Counter(question.id for question in found).items() if times > 1]
    check(not again, "questions", "every id once", " and ".join(map(repr, again)) + " twice")
    known = sorted({question.family for question in found})
    for family in families:
        check_known(family, known, "families")
    found = [question for question in found if not families or question.family in families]
    one = len({question.kind for question in found}) == 1
    check(one, "questions", "all of them about images, or all about clips", "both")
    sizes = {image: question.pictures()[0].size for image, question in {q.image: q for q in found}.items()}
    return [replace(question, size=sizes[question.image]) for question in found]


def _read(text: str, number: int, folder: Path, labelled: bool) -> Question:
    where = f"{FILE} line {number}"
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected a JSON object, got {text[:60]!r}") from error
    check(isinstance(entry, dict), where, "a JSON object", text[:60])
    if not labelled:
        entry = dict.fromkeys(LABELS, "") | entry
    for field in FIELDS:
        value = entry.get(field)
        said = isinstance(value, str) and (bool(value) or (not labelled and field in LABELS))
        check(said, where, f"a text as {field!r}", repr(value))
    kind, image = _picture(entry, folder, where)
    box = entry.get("box")
    if box is not None:
        numbers = isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)
        check(numbers and all(map(math.isfinite, box)), where, "four numbers as 'box'", repr(box))
        check(kind == "image", where, "no 'box' beside 'video'", repr(box))
        box = tuple(box)
    return Question(**{field: entry[field] for field in FIELDS} | {"image": image, "box": box, "kind": kind})


def _picture(entry: dict[str, Any], folder: Path, where: str) -> tuple[str, Path]:
    """Whether a line is about an image or a video, and which."""
    given = [kind for kind in KINDS if isinstance(entry.get(kind), str) and entry[kind]]
    check(len(given) == 1, where, "a text as 'image' or as 'video'", "both" if given else "neither")
    (kind,), path = given, folder / entry[given[0]]
    there = path.is_file() or (kind == "video" and path.is_dir())
    what = "an image file" if kind == "image" else "an animation or a folder of frames"
    check(there, where, f"{what} in the folder", repr(entry[kind]))
    return kind, path
