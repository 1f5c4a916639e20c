"""The goals of whole models, against what `vlmprune bench --out` wrote: ``python benchmarks/gpu_day/speed_goals.py FOLDER ...``.

Met, missed or unmeasured. Each folder holds a results.json, or folders that do. A speed-up is the unpruned model's median over
the policy's, each the faster of its plain path and its CUDA graphs, so that graphs alone gain nothing. What a CPU measured does
not count. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

RESULTS, UNPRUNED = "results.json", "unpruned"
OURS = ("plain", "graphs")
LLAVA, NEXT = "llava-1.5-7b", "llava-next-7b"
OF_ROOFLINE = ((LLAVA, 1, 0.90), (NEXT, 1, 0.95), (LLAVA, 16, 0.95))
"""Shape, batch size, and which share of the roofline's prefill ratio is to be reached, by every policy."""
KEPT = 320
TIMES = (("prefill", 2.7), ("total", 2.1))
"""How many times as fast LLaVA-NeXT is to be with 320 of 2,880 tokens (PIO-FVLM's 2.67 and 2.11), by the best policy."""
SELECTION = 1e-4
"""Seconds that selection may take, of every policy and shape."""


class Gain(NamedTuple):
    """A policy's speed-up in one phase, and what the roofline allows."""

    times: float
    roofline: float
    method: str


class Results:
    """The rows of several runs on a GPU, by shape; the last run of a shape and batch size counts."""

    def __init__(self, runs: Iterable[dict[str, Any]]) -> None:
        self._rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for run in runs:
            settings = run["settings"]
            if not settings["device"].startswith("cpu"):
                for batch in settings["batch"]:
                    some = [row for row in run["rows"] if row["batch"] == batch]
                    self._rows[settings["model"], batch] = some

    def rows(self, shape: str, batch: int) -> list[dict[str, Any]]:
        """Those of our ways, and the unpruned model's, that ran."""
        every = self._rows.get((shape, batch), [])
        return [row for row in every if row["reason"] is None and row["way"] in OURS]

    def shapes(self) -> list[tuple[str, int]]:
        """Shapes and batch sizes that were measured."""
        return [*self._rows]

    def gains(self, shape: str, batch: int, phase: str, most: float = float("inf")) -> list[Gain]:
        """Of every policy that keeps ``most`` tokens of a sample behind its last stage, the fastest first."""
        best: dict[str, tuple[float, float]] = {}
        for row in self.rows(shape, batch):
            fits = row["method"] == UNPRUNED or (row["stages"] and row["stages"][-1][2] <= most)
            if fits and phase in row["seconds"] and phase in row["roofline"]:
                found = row["seconds"][phase]["median"], row["roofline"][phase]
                best[row["method"]] = min(found, best.get(row["method"], found))
        if UNPRUNED not in best:
            return []
        base, _ = best.pop(UNPRUNED)
        return sorted((Gain(base / s, ratio, name) for name, (s, ratio) in best.items()), reverse=True)


def verdicts(results: Results) -> Iterator[str]:
    """One line a goal and, where all are to reach it, policy."""
    for shape, batch, share in OF_ROOFLINE:
        goal = f"prefill at least {share:.2f} of the roofline ratio, {shape}, batch {batch}"
        gains = results.gains(shape, batch, "prefill")
        for gain in gains:
            told = (
                f"{gain.method}: {gain.times / gain.roofline:.2f} ({gain.times:.2f} of {gain.roofline:.2f})"
            )
            yield f"{_word(gain.times >= share * gain.roofline)}  {goal}: {told}"
        if not gains:
            yield f"unmeasured  {goal}"
    for phase, times in TIMES:
        goal = f"{phase} {times:g} times as fast with {KEPT} of 2,880 tokens, {NEXT}, batch 1"
        gains = results.gains(NEXT, 1, phase, KEPT)
        if gains:
            yield f"{_word(gains[0].times >= times)}  {goal}: {gains[0].times:.2f} ({gains[0].method})"
        else:
            yield f"unmeasured  {goal}"
    yield from selections(results)


def selections(results: Results) -> Iterator[str]:
    """What selection takes where a clock saw it: on the plain path."""
    goal, seen = f"selection under {1e3 * SELECTION:g} ms", False
    for shape, batch in results.shapes():
        for row in results.rows(shape, batch):
            taken = row["seconds"].get("selection", {"median": 0.0})["median"]
            if batch == 1 and taken > 0:
                seen = True
                yield f"{_word(taken < SELECTION)}  {goal}, {shape}: {1e3 * taken:.3f} ms ({row['arm']})"
    if not seen:
        yield f"unmeasured  {goal}"


def read(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The runs in these folders and those right inside them, in the order in which they were written."""
    paths = [path for folder in folders for path in (*folder.glob(RESULTS), *folder.glob(f"*/{RESULTS}"))]
    return [json.loads(path.read_text()) for path in sorted(paths, key=lambda path: path.stat().st_mtime)]


def _word(met: bool) -> str:
    return "met       " if met else "missed    "


def main() -> int:
    """Print every goal; 0 whatever they are."""
    if len(sys.argv) < 2:
        print(f"usage: {Path(sys.argv[0]).name} FOLDER ...", file=sys.stderr)
        return 2
    for line in verdicts(Results(read(map(Path, sys.argv[1:])))):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
