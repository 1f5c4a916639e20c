"""The folder of a run: what was asked for, the log, and the latest state, which is replaced whole or not at all.

OUT/settings.json           all that the result depends on
OUT/log.jsonl               one line a step
OUT/saved/step-000120/      compensator/ and training.pt
OUT/latest                  a link to the folder of the latest save: moved when that is complete
OUT/compensator             a link to latest/compensator
OUT/reference/              the frozen captioner of DPO, if that is how it is trained
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmprune.compensation import Captioner, Describer, load_compensator
from vlmprune.errors import InputError, check

SETTINGS, STATE, COMPENSATOR, LATEST = "settings.json", "training.pt", "compensator", "latest"
NO_FIGURES = {"step", "seconds", "seed", "rates"}
"""What a line of the log says besides."""


class Folder:
    """Where a run is kept. Nothing is written before ``open``."""

    def __init__(self, path: Path, resume: bool) -> None:
        """Look at what is there.

        Args:
            path: the folder, or a new name in an existing one.
            resume: whether a run is to be continued.

        Raises:
            InputError: no place for a folder, a run where none is to be continued, or none where one is.
        """
        self.path = path
        there = path.exists()
        check(not there or path.is_dir(), "out", "a folder, or a new name", repr(str(path)))
        check(path.parent.is_dir(), "out", "a folder inside an existing one", repr(str(path)))
        holds = (path / SETTINGS).exists()
        check(resume or not holds, "out", "a new folder, or resume", f"{str(path)!r}, which holds a run")
        check(holds or not resume, "resume", "a run in out", f"none in {str(path)!r}")
        others = there and not holds and any(path.iterdir())
        check(
            not others, "out", "an empty folder, or a new name", f"{str(path)!r}, which holds something else"
        )

    @property
    def latest(self) -> Path | None:
        """The folder of the latest save; None before the first."""
        link = self.path / LATEST
        return link.resolve() if link.exists() else None

    def open(self, settings: Mapping[str, Any]) -> None:
        """Note what is asked for, or compare it with what was.

        Raises:
            InputError: the run that is to be continued was asked for otherwise; names the first difference.
        """
        file = self.path / SETTINGS
        new = json.loads(json.dumps(dict(settings)))  # tuples become lists
        if file.exists():
            try:
                old = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{file}: expected a JSON object, got: {error}") from error
            for name, value in new.items():
                expected = f"a run with {name} = {value!r} to resume"
                check(old.get(name) == value, "out", expected, f"one with {old.get(name)!r}")
            return
        self.path.mkdir(exist_ok=True)
        _replace(file, json.dumps(new, indent=2).encode())

    def save(self, describer: Describer, state: Mapping[str, Any]) -> None:
        """Write the whole state beside the others, and only then make it the latest."""
        saved, before = self.path / "saved", self.latest
        part, target = saved / "part", (saved / f"step-{state['step']:06d}").resolve()
        if target == before:
            return  # nothing has happened since
        for unfinished in (part, target):
            shutil.rmtree(unfinished, ignore_errors=not unfinished.exists())
        part.mkdir(parents=True)
        describer.save_pretrained(part / COMPENSATOR)
        torch.save(dict(state), part / STATE)
        part.rename(target)
        _link(self.path / LATEST, Path("saved") / target.name)
        _link(self.path / COMPENSATOR, Path(LATEST) / COMPENSATOR)
        # The one before is left to whoever is just reading it.
        for old in set(saved.resolve().iterdir()) - {target, before}:
            shutil.rmtree(old)

    def load(self, device: torch.device | str) -> tuple[Describer, dict[str, Any]]:
        """The latest save. Only to be asked for where there is one."""
        latest = self.latest
        assert latest is not None
        state = torch.load(latest / STATE, map_location=device, weights_only=True)
        return load_compensator(latest / COMPENSATOR), state

    def reference(self, captioner: Captioner | None) -> Captioner:
        """The captioner of the start, which ``captioner`` is if this is the start."""
        path = self.path / "reference"
        if captioner is not None:
            captioner.save_pretrained(path)
        return Captioner.from_pretrained(path)

    def cut_log(self, step: int) -> None:
        """Forget lines of steps that were taken after the state from which the run goes on: they are taken again."""
        log = self.path / "log.jsonl"
        if log.exists():
            whole = [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            _replace(log, b"".join(line for line in whole if json.loads(line)["step"] <= step))

    def recent(self, steps: int) -> list[dict[str, float]]:
        """The figures of the last lines of the log."""
        log = self.path / "log.jsonl"
        lines = log.read_text().splitlines()[-steps:] if log.exists() else []
        return [{k: v for k, v in json.loads(line).items() if k not in NO_FIGURES} for line in lines]

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        with (self.path / "log.jsonl").open("ab") as file:
            file.write(json.dumps(dict(line)).encode() + b"\n")


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def _link(path: Path, target: Path) -> None:
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    part.symlink_to(target, target_is_directory=True)
    os.replace(part, path)
