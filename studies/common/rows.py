"""One CSV row per measured quantity, with its interval and with everything needed to know what was measured, and where."""

from __future__ import annotations

import csv
import datetime
import io
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers

from vlmprune import __version__
from vlmprune.eval import Estimate
from vlmprune.eval.store import write


@dataclass(frozen=True)
class Row:
    """A mean over questions (or draws) with its 95 % interval.

    Attributes:
        model: the name given to the checkpoint.
        part: "budget", "sweep", "kept" or "rope".
        method: what prunes; in "rope": "with RoPE", "without" or "difference".
        quantity: what was averaged.
        n: how many questions or draws.
        mean, low, high: the mean and its interval; of a difference, taken question by question.
        budget: the FLOPs cut that the method was fitted to.
        layer: the stage's layer, or the layer that is scored.
        family: of the questions.
        note: the policy with all its settings (beside "right"), or what an even spread would give.
    """

    model: str
    part: str
    method: str
    quantity: str
    n: int
    mean: float
    low: float
    high: float
    budget: float | None = None
    layer: int | None = None
    family: str = ""
    note: str = ""

    @property
    def estimate(self) -> Estimate:
        """The mean with its interval."""
        return Estimate(self.mean, self.low, self.high)


def row(estimate: Estimate, n: int, **named: object) -> Row:
    """A row of an estimate, rounded to what it can say."""
    mean, low, high = (round(value, 4) for value in estimate)
    return Row(n=n, mean=mean, low=low, high=high, **named)  # type: ignore[arg-type]


def save(path: Path, rows: Sequence[Row], dtype: str) -> None:
    """Write the rows into a CSV file; those that it has of the same model, part, method and budget go, all others stay.

    So a run of some methods leaves the others' rows alone.
    """
    old = []
    if path.exists():
        new = set(map(_measured, rows))
        with path.open(newline="") as file:
            old = [line for line in csv.DictReader(file) if _measured(_read(line)) not in new]
    where = machine() | {"dtype": dtype}
    lines = [*old, *({**asdict(r), **where} for r in rows)]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*(field.name for field in fields(Row)), *where], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write(path, out.getvalue().encode())


def _measured(r: Row) -> tuple[str, str, str, float | None]:
    return r.model, r.part, r.method, r.budget


def load(path: Path) -> list[Row]:
    """All rows of a file, without the columns on when and where."""
    with path.open(newline="") as file:
        return [_read(line) for line in csv.DictReader(file)]


def find(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows that have these values."""
    return [r for r in rows if all(getattr(r, name) == value for name, value in wanted.items())]


def _read(line: dict[str, str]) -> Row:
    numbers = {name: float(line[name]) for name in ("mean", "low", "high")}
    budget, layer = (float(line["budget"]) if line["budget"] else None), line["layer"]
    texts = {name: line[name] for name in ("model", "part", "method", "quantity", "family", "note")}
    return Row(n=int(line["n"]), budget=budget, layer=int(layer) if layer else None, **numbers, **texts)


def machine() -> dict[str, str]:
    """The columns that say when, where and with what."""
    cpu = platform.processor() or platform.machine()
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        names = [
            x.partition(":")[2].strip() for x in listed.read_text().split("\n") if x.startswith("model name")
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": cpu,
        "vlmprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
