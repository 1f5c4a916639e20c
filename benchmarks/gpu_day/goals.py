"""The goals, against rows of a CSV of results: ``python benchmarks/gpu_day/goals.py rows.csv``; met, missed or unmeasured.

A goal counts the median of a graph replay with a cold L2 cache, bf16, one scoring row; of our ways the fastest counts.
Needs nothing but the standard library.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OURS = ("plan", "triton", "cuda")
SLACK = 1.25  # on a calculated figure
# microseconds of score, select and gather for one scoring row, as calculated for an H200
FIGURES = {
    "llava-1.5-7b": 16,
    "llava-next-7b": 26,
    "qwen2.5-vl-7b-4k": 21,
    "qwen2.5-vl-7b-16k": 36,
    "qwen2.5-vl-7b-32k": 59,
}


class Versus(NamedTuple):
    """Ours is to be ``times`` as fast as ``provider`` at these shapes."""

    case: str
    provider: str
    times: float
    shapes: tuple[str, ...] = tuple(FIGURES)


LONG = tuple(name for name in FIGURES if name != "llava-1.5-7b")  # from 2,944 tokens on
VERSUS = (
    Versus("prune_tokens", "torch", 5),
    Versus("prune_tokens", "torch.compile", 3),
    Versus("prune_tokens", "eager", 20, LONG),
    Versus("received_attention", "flash-colreduce", 1),
    Versus("greedy_select maxmin", "published loop", 20, ("llava-next-7b",)),
)


class Results:
    """Medians and notes by case, shape and provider; the last row of a kind counts."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self._medians: dict[tuple[str, str, str], float] = {}
        self._notes: dict[tuple[str, str, str], str] = {}
        for row in rows:
            at = (row["case"], row["shape"], row["provider"])
            if row["dtype"] != "bf16" or row["rows"] not in ("0", "1"):
                continue
            if row["mode"] == "graph" and row["median_us"]:
                self._medians[at] = float(row["median_us"])
            elif row["note"]:
                self._notes[at] = row["note"]

    def of(self, case: str, shape: str, *providers: str) -> tuple[float, str] | None:
        """(median, provider) of the fastest, None if none was measured."""
        at = [(case, shape, provider) for provider in providers]
        return min(((self._medians[key], key[2]) for key in at if key in self._medians), default=None)

    def why_not(self, case: str, shape: str, provider: str) -> str:
        """Why there is no time."""
        return self._notes.get((case, shape, provider), "no row")


def verdicts(results: Results) -> Iterator[str]:
    """One line a goal and shape."""
    for shape, figure in FIGURES.items():
        best, limit = results.of("prune_tokens", shape, *OURS), SLACK * figure
        goal = f"prune_tokens at most {limit:.4g} us, {shape}"
        if best is None:
            yield f"unmeasured  {goal}: {results.why_not('prune_tokens', shape, 'triton')}"
        else:
            yield f"{_word(best[0] <= limit)}  {goal}: {best[0]:.4g} us ({best[1]})"
    for case, provider, times, shapes in VERSUS:
        for shape in shapes:
            ours, other = results.of(case, shape, *OURS), results.of(case, shape, provider)
            goal = f"{case} {times:g} times as fast as {provider}, {shape}"
            if ours is None or other is None:
                yield f"unmeasured  {goal}: {results.why_not(case, shape, 'triton' if ours is None else provider)}"
                continue
            ratio = other[0] / ours[0]
            met = ratio > times if times == 1 else ratio >= times
            yield f"{_word(met)}  {goal}: {ratio:.3g} ({ours[1]} {ours[0]:.4g} us, {provider} {other[0]:.4g} us)"


def _word(met: bool) -> str:
    return "met       " if met else "missed    "


def main() -> int:
    """Print every goal; 0 whatever they are."""
    if len(sys.argv) != 2:
        print(f"usage: {Path(sys.argv[0]).name} ROWS.csv", file=sys.stderr)
        return 2
    with Path(sys.argv[1]).open(newline="") as file:
        for line in verdicts(Results(list(csv.DictReader(file)))):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
