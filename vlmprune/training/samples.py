"""What is trained on: one JSON object a line, with an image, a question about it and the true answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlmprune.errors import InputError, check

FILE = "questions.jsonl"
ASKED = ("question", "prompt")
"""Names a line may have for what is asked; the first that is there counts."""


@dataclass(frozen=True)
class Sample:
    """One question with its answer.

    Attributes:
        where: file and line, for errors.
        image: the image file.
        question: what is asked; with the image placeholder token in it, it is the full prompt, taken literally.
        answer: the true answer; "" where it is not wanted.
        caption: what is to be said of the image; "" where it is not wanted.
    """

    where: str
    image: Path
    question: str
    answer: str
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Samples:
    """All of them, and the order in which they come: every epoch in an order of its own, which the seed fixes.

    Attributes:
        items: in the order of the file.
        digest: tells this file from another.
    """

    items: Sequence[Sample]
    digest: str

    def batch(self, step: int, size: int, seed: int) -> list[Sample]:
        """The samples of a step. They depend on nothing else, so a run that goes on elsewhere meets the same ones."""
        count = len(self.items)
        places = range(step * size, (step + 1) * size)
        orders = {epoch: _order(count, epoch, seed) for epoch in {place // count for place in places}}
        return [self.items[int(orders[place // count][place % count])] for place in places]


@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    draw.manual_seed(int(torch.randint(1 << 62, (), generator=draw)) + epoch)
    return torch.randperm(count, generator=draw)


def read_samples(source: Path | str, wanted: Literal["answer", "caption"] = "answer") -> Samples:
    """Read a file of samples, or the ``questions.jsonl`` of a folder, as ``vlmprune eval`` takes it.

    Images are looked for, and read when their turn comes. ``wanted`` is what each line has to have besides.

    Raises:
        InputError: no such file, no line in it, or one that is malformed or names an image that is not there.
    """
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    check(path.is_file(), "data", f"a JSONL file, or a folder with a {FILE}", repr(str(source)))
    data = path.read_bytes()
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got {error.reason}") from error
    items = [
        _read(text, f"{path}:{n}", path.parent, wanted) for n, text in enumerate(lines, 1) if text.strip()
    ]
    check(bool(items), "data", f"at least one line in {path}", "none")
    return Samples(items, hashlib.sha256(data).hexdigest()[:16])


def _read(text: str, where: str, folder: Path, wanted: str) -> Sample:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected a JSON object, got {text[:60]!r}") from error
    check(isinstance(entry, dict), where, "a JSON object", text[:60])
    asked = next((name for name in ASKED if name in entry), ASKED[0])
    for field in ("image", asked, wanted):
        value = entry.get(field)
        check(isinstance(value, str) and bool(value.strip()), where, f"a text as {field!r}", repr(value))
    image = folder / entry["image"]
    check(image.is_file(), where, "an image file, named from the folder of the data", repr(entry["image"]))
    return Sample(where, image, entry[asked], **{"answer": "", wanted: entry[wanted]})
