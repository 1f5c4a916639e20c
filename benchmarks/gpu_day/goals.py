"""The goals, against rows of a CSV of results: ``python benchmarks/gpu_day/goals.py rows.csv``; met, missed or unmeasured.

A goal counts the median of a graph replay with a cold L2 cache, bf16, one scoring row; of our ways the fastest counts. Behind
the goals: how the same comparisons stand as the host calls, and which backend each op should take.
Needs nothing but the standard library.
"""

from __future__ import annotations

import csv
import math
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
# how much of that is moving the fewest bytes; the rest, latency, is the same on a card of another bandwidth
BYTES = {
    "llava-1.5-7b": 3.7,
    "llava-next-7b": 13.5,
    "qwen2.5-vl-7b-4k": 7.3,
    "qwen2.5-vl-7b-16k": 16,
    "qwen2.5-vl-7b-32k": 32,
}
COPY = 4100  # GB/s, read plus written, that both were calculated with


def limit_us(shape: str, copy: float = COPY) -> float:
    """What the stage may take on a card that copies ``copy`` GB/s."""
    return SLACK * (FIGURES[shape] - BYTES[shape] + BYTES[shape] * COPY / copy)


FLOAT32 = ("select_topk", "select_segments")  # whose operands are that whatever the model's are


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


class Measured(NamedTuple):
    """A median, whose it is, and the rate of a large copy in the same run."""

    us: float
    provider: str
    copy: float

    def __str__(self) -> str:
        return f"{self.provider} {self.us:.4g} us"


class Results:
    """Medians of one mode, and notes, by case, shape and provider; the last row of a kind counts."""

    def __init__(self, rows: list[dict[str, str]], mode: str = "graph") -> None:
        self._measured: dict[tuple[str, str, str], Measured] = {}
        self._notes: dict[tuple[str, str, str], str] = {}
        for row in rows:
            at = (row["case"], row["shape"], row["provider"])
            if row["dtype"] not in ("bf16", "fp32") or row["rows"] not in ("0", "1"):
                continue
            if row["dtype"] == "fp32" and row["case"] not in FLOAT32:
                continue
            if row["mode"] == mode and row["median_us"]:
                found = float(row["median_us"]), row["provider"], float(row["copy_gb_per_s"])
                self._measured[at] = Measured(*found)
            elif row["note"]:
                self._notes[at] = row["note"]

    def of(self, case: str, shape: str, *providers: str) -> Measured | None:
        """The fastest, None if none was measured."""
        at = [(case, shape, provider) for provider in providers]
        return min((self._measured[key] for key in at if key in self._measured), default=None)

    def why_not(self, case: str, shape: str, provider: str) -> str:
        """Why there is no time."""
        return self._notes.get((case, shape, provider), "no row")

    def both(self, one: str, other: str) -> dict[str, list[float]]:
        """Of every case that both providers were measured at: the time of ``one`` over that of ``other``, by shape."""
        ratios: dict[str, list[float]] = {}
        for (case, shape, provider), found in self._measured.items():
            against = self._measured.get((case, shape, other))
            if provider == one and against is not None:
                ratios.setdefault(case, []).append(found.us / against.us)
        return ratios


def verdicts(results: Results) -> Iterator[str]:
    """One line a goal and shape."""
    for shape in FIGURES:
        best = results.of("prune_tokens", shape, *OURS)
        limit = limit_us(shape) if best is None else limit_us(shape, best.copy)
        goal = f"prune_tokens at most {limit:.4g} us, {shape}"
        if best is None:
            yield f"unmeasured  {goal}: {results.why_not('prune_tokens', shape, 'triton')}"
        else:
            yield f"{_word(best.us <= limit)}  {goal}: {best}, copy {best.copy:.0f} GB/s"
    yield from comparisons(results)


def comparisons(results: Results) -> Iterator[str]:
    """Those of the goals that name another provider."""
    for case, provider, times, shapes in VERSUS:
        for shape in shapes:
            ours, other = results.of(case, shape, *OURS), results.of(case, shape, provider)
            goal = f"{case} {times:g} times as fast as {provider}, {shape}"
            if ours is None or other is None:
                yield f"unmeasured  {goal}: {results.why_not(case, shape, 'triton' if ours is None else provider)}"
                continue
            ratio = other.us / ours.us
            met = ratio > times if times == 1 else ratio >= times
            yield f"{_word(met)}  {goal}: {ratio:.3g} ({ours}, {other})"


def defaults(results: Results) -> Iterator[str]:
    """Where an op has two backends: which should be asked first."""
    for case, ratios in results.both("cuda", "triton").items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        faster = sum(ratio < 1 for ratio in ratios)
        best = "cuda" if mean < 1 else "triton"
        yield (
            f"{case}: default should be {best} (cuda takes {mean:.2f} of triton's time in the mean, "
            f"is faster at {faster} of {len(ratios)} shapes)"
        )


def _word(met: bool) -> str:
    return "met       " if met else "missed    "


def main() -> int:
    """Print every goal; 0 whatever they are."""
    if len(sys.argv) != 2:
        print(f"usage: {Path(sys.argv[0]).name} ROWS.csv", file=sys.stderr)
        return 2
    with Path(sys.argv[1]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for line in verdicts(Results(rows)):
        print(line)
    print("\nas the host calls, its time included:")
    for line in comparisons(Results(rows, "call")):
        print(line)
    print("\nbackends:")
    for line in defaults(Results(rows)):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
