"""Answers on disk: one JSON line each, appended as it comes, so that a killed run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.errors import InputError, check

ANSWERS, SETTINGS = "answers.jsonl", "settings.json"
Key = tuple[str, str, int]
"""Policy with its settings, question id, seed."""


@dataclass(frozen=True)
class Answer:
    """One question answered by one arm.

    Attributes:
        policy, question, seed: the key.
        answer: the generated text.
        right: whether it counts as right (a box: IoU >= 0.5).
        exact: whether it is the true answer.
        cut: share of the decoder's prefill FLOPs saved on this question, padding not counted.
        tokens: visual tokens, mean over the decoder layers' inputs.
        prefill: seconds of the batch's prefill divided by its questions.
        kept: per stage as ``(layer, bits)``: the visual tokens that survived; bit i of the hexadecimal number is token i.
    """

    policy: str
    question: str
    seed: int
    answer: str
    right: bool
    exact: bool
    cut: float
    tokens: float
    prefill: float
    kept: tuple[tuple[int, str], ...]

    @property
    def key(self) -> Key:
        """What makes this answer this one."""
        return self.policy, self.question, self.seed


def check_out(folder: Path) -> None:
    """Raise InputError unless results can be written there; asked before anything slow."""
    check(not folder.exists() or folder.is_dir(), "out", "a folder, or a new name", repr(str(folder)))
    check(folder.parent.is_dir(), "out", "a folder inside an existing one", repr(str(folder)))


class Store:
    """The answers of one model to one set of questions, in a folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open or make the folder.

        Args:
            folder: where to; made if it is not there.
            settings: all that the answers depend on besides their keys: model, weights, questions, precision, ...

        Raises:
            InputError: the folder holds answers made with other settings, or a file that is not ours.
        """
        path = folder / SETTINGS
        if path.exists():
            old = _read_settings(path)
            for name, value in settings.items():
                expected = f"a new folder, or one made with {name} = {value!r}"
                check(old.get(name) == value, "out", expected, f"one made with {old.get(name)!r}")
        else:
            lost = (folder / ANSWERS).exists()
            check(not lost, "out", f"a folder with {SETTINGS} beside {ANSWERS}", repr(str(folder)))
        self.path = folder / ANSWERS
        self.answers = _read(self.path)
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps(dict(settings), indent=2).encode())

    def add(self, answer: Answer) -> None:
        """Append one answer to the file. Raises InputError if it is there already."""
        check(answer.key not in self.answers, "answer", "a new one", repr(answer.key))
        line = json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
        self.answers[answer.key] = answer


def write(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(data)
    os.replace(beside, path)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of both steps
        raise InputError(f"{path}: expected a JSON object, got: {error}") from error
    check(isinstance(old, dict), str(path), "a JSON object", type(old).__name__)
    return dict(old)


def _read(path: Path) -> dict[Key, Answer]:
    """All answers of a file. What stands after its last line break was cut short by a kill, and goes."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found: dict[Key, Answer] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            answer = Answer(**entry | {"kept": tuple((layer, bits) for layer, bits in entry["kept"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} line {number}: expected an answer, got {line[:60]!r}") from error
        check(answer.key not in found, f"{path} line {number}", "every answer once", repr(answer.key))
        found[answer.key] = answer
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return found
