"""Reads a folder of questions: ``questions.jsonl``, one JSON object a line, and the images it names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlmprune.errors import check

FILE = "questions.jsonl"
FIELDS = ("id", "image", "family", "prompt", "answer")


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        id: its name, unique in the folder.
        image: the image file.
        family: what kind of question it is; accuracy is told per family.
        prompt: what is asked; with the image placeholder token in it, taken literally.
        answer: the true answer. Four whole numbers are a box ``x1 y1 x2 y2``.
    """

    id: str
    image: Path
    family: str
    prompt: str
    answer: str


def read_questions(folder: Path, families: Sequence[str] = ()) -> list[Question]:
    """The questions of these families, or of all; in the order of the file.

    A line's ``box``, where there is one, says where in the image its object is. It is allowed and not used: boxes are
    scored in the units of the answer.

    Raises:
        ValueError: no such folder or file, a malformed line (with its number), an image that is not there, two
            questions of one id, or a family no question has.
    """
    path = folder / FILE
    check(path.is_file(), "--questions", f"a folder with a {FILE}", repr(str(folder)))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error.reason}") from error
    found = [_read(text, n, folder) for n, text in enumerate(lines, 1) if text.strip()]
    check(bool(found), "--questions", f"at least one line in {path}", "none")
    first: dict[str, Question] = {}
    for question in found:
        again = question.id in first
        check(not again, "--questions", "every id once", f"{question.id!r} twice")
        first[question.id] = question
    for image in {question.image: None for question in found}:
        _check_image(image)
    known = sorted({question.family for question in found})
    for family in families:
        check(family in known, "--family", f"one of {', '.join(known)}", repr(family))
    return [question for question in found if not families or question.family in families]


def _check_image(path: Path) -> None:
    try:
        with Image.open(path):  # reads the header only
            pass
    except OSError as error:
        raise ValueError(
            f"--questions: expected an image, got {str(path)!r}, which cannot be read"
        ) from error


def _read(text: str, number: int, folder: Path) -> Question:
    where = f"{FILE} line {number}"
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, got {text[:60]!r}") from error
    check(isinstance(entry, dict), where, "a JSON object", text[:60])
    for field in FIELDS:
        value = entry.get(field)
        check(isinstance(value, str) and bool(value), where, f"a text as {field!r}", repr(value))
    image = folder / entry["image"]
    check(image.is_file(), where, "an image file in the folder", repr(entry["image"]))
    return Question(**{field: entry[field] for field in FIELDS} | {"image": image})
