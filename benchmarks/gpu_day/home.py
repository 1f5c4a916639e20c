"""What came back from a GPU, put in its place at home: ``python -P benchmarks/gpu_day/home.py FOLDER``, the $OUT of the last call.

Its rows join benchmarks/results/<device>.csv, with plots beside it, and what `vlmprune bench` found lies in
benchmarks/results/<device>-bench/; what was trained lies in build/learned/, with rows of studies/where_to_look. Then the tables for README.md are printed, as Markdown. Called again it adds nothing.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ only: a checkout must stay off the path

from gpu_day import goals, speed_goals
from gpu_day.kit import ROOT
from gpu_day.state import LEARNED, TAR, State
from micro.plot import draw
from micro.rows import read, slug_of

RESULTS = Path(__file__).parents[1] / "results"
STAGE = "prune_tokens"
OTHERS = ("torch", "torch.compile", "scores + topk", "eager")
OP_HEADS = ("prune_tokens, us", "of", "ours", "floor", "limit", *OTHERS)
MODEL_HEADS = ("model", "batch", "policy", "prefill", "roofline", "whole answer", "roofline")


def main() -> int:
    """File everything, and print the tables."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("folder", type=Path, help=f"has {TAR}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what is published")
    parser.add_argument(
        "--learned", type=Path, default=ROOT / "build" / LEARNED, help="folder of what was trained"
    )
    chosen = parser.parse_args()
    if not (chosen.folder / TAR).exists():
        parser.error(f"folder: expected one with {TAR}, got {chosen.folder}")
    with tempfile.TemporaryDirectory() as scratch:
        state = State(Path(scratch))
        state.load(chosen.folder / TAR)
        if not state.rows.exists():
            parser.error(f"folder: expected rows in {TAR}, got none: no op was timed")
        if (state.folder / LEARNED).exists():
            shutil.copytree(state.folder / LEARNED, chosen.learned, dirs_exist_ok=True)
        for path in file_rows(state.rows, chosen.results):
            print(f"{path}", file=sys.stderr)
            for mode in ("graph", "call"):
                draw(path, mode)
            shutil.copytree(state.bench, path.with_name(f"{path.stem}-bench"), dirs_exist_ok=True)
            print(markdown(OP_HEADS, op_lines(read(path))))
    bench = speed_goals.read(sorted(chosen.results.glob("*-bench")))
    print(markdown(MODEL_HEADS, model_lines(speed_goals.Results(bench))))
    return 0


def file_rows(rows: Path, results: Path) -> list[Path]:
    """Add the rows that are not there yet to the table of their device; the tables."""
    devices: dict[str, list[dict[str, str]]] = {}
    for row in read(rows):
        devices.setdefault(row["device"], []).append(row)
    out = []
    for device, new in devices.items():
        path = results / f"{slug_of(device)}.csv"
        known = read(path) if path.exists() else []
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*new[0]])
            if not known:
                writer.writeheader()
            writer.writerows(row for row in new if row not in known)
        out.append(path)
    return out


def op_lines(rows: list[dict[str, str]]) -> Iterator[tuple[str, ...]]:
    """Scoring, selection and gathering of one scoring row: a line a shape, device time; times of ours behind the others'."""
    found = goals.Results(rows)
    for shape in goals.FIGURES:
        ours = found.of(STAGE, shape, *goals.OURS)
        if ours is None:
            continue
        row = next(r for r in rows if (r["case"], r["shape"]) == (STAGE, shape) and r["floor_us"])
        cells = [f"{ours.us:.3g} ({ours.provider})", f"{float(row['floor_us']):.3g}"]
        cells.append(f"{goals.limit_us(shape, ours.copy):.3g}")
        for provider in OTHERS:
            other = found.of(STAGE, shape, provider)
            cells.append("" if other is None else f"{other.us:.4g} ({other.us / ours.us:.3g}x)")
        yield shape, f"{row['visual']} -> {row['kept']}", *cells


def model_lines(results: speed_goals.Results) -> Iterator[tuple[str, ...]]:
    """How many times as fast whole models are, and could be: a line a policy, the fastest first."""
    for shape, batch in results.shapes():
        whole = {gain.method: gain for gain in results.gains(shape, batch, "total")}
        for gain in results.gains(shape, batch, "prefill"):
            total = whole.get(gain.method)
            rest = ("", "") if total is None else (f"{total.times:.2f}x", f"{total.roofline:.2f}x")
            yield shape, str(batch), gain.method, f"{gain.times:.2f}x", f"{gain.roofline:.2f}x", *rest


def markdown(heads: Sequence[str], lines: Iterator[tuple[str, ...]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)) + "\n"


if __name__ == "__main__":
    sys.exit(main())
