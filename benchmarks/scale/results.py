"""Rows of a CSV, with where and with what they were measured; the table, the exponents and the plot made of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from micro.rows import machine
from micro.stub import cpu
from micro.table import print_table

from .fit import AXES, Fit, lines_of
from .measure import PHASES, Point

UNITS = {
    "visual": "visual tokens of one image",
    "images": "images of a prompt",
    "batch": "prompts of a batch",
}


def row_of(model: Any, size: str, point: Point, columns: dict[str, Any]) -> dict[str, Any]:
    """A line of the CSV."""
    device = model.device
    where = {k: v for k, v in machine(device).items() if k in ("date", "commit", "device", "python", "torch")}
    if device.type != "cuda":
        where["device"] = f"{cpu()}, {torch.get_num_threads()} threads"
    config = {"size": size, "dtype": str(model.dtype).removeprefix("torch.")}
    config["attention"] = model.config.get_text_config()._attn_implementation
    return where | config | asdict(point) | {"at": point.at} | columns


def append(path: Path, row: dict[str, Any]) -> None:
    """Write one line at once, so that a run that is cut off leaves what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    """The last line of every point, sorted. Raises SystemExit where lines are of several machines or models."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for column in ("device", "size", "dtype", "attention"):
        different = sorted({row[column] for row in lines})
        if len(different) > 1:
            raise SystemExit(f"{path}: expected lines of one {column}, got {', '.join(different)}")
    newest = {(row["axis"], row["policy"], int(row["at"])): row for row in lines}
    order = list(dict.fromkeys(row["policy"] for row in lines))
    return sorted(
        newest.values(), key=lambda r: (AXES.index(r["axis"]), order.index(r["policy"]), int(r["at"]))
    )


def show(rows: Sequence[dict[str, str]], found: Sequence[Fit]) -> None:
    """Medians in milliseconds, then the exponents."""
    heads = ("axis", "policy", "tokens", "images", "batch", "kept", *(f"{phase} ms" for phase in PHASES))
    heads += ("selection / prefill", "runs")
    cells = []
    for row in rows:
        selection, prefill = row["selection_median_ms"], row["prefill_median_ms"]
        share = f"{100 * float(selection) / float(prefill):.2f} %" if selection else ""
        places = (row[k] for k in ("axis", "policy", "tokens", "images", "batch", "kept"))
        cells.append((*places, *_shown(row), share, row["runs"]))
    first = rows[0]
    what = (
        f"{first['device']}; {first['size']}, {first['dtype']}, {first['attention']}; torch {first['torch']}"
    )
    print_table(f"medians on {what}", heads, cells, range(2, 11), 2)
    heads = ("axis", "policy", *PHASES, "from", "points")
    print_table("time = c x^e: e", heads, exponents(found), range(2, 7), 1)


def exponents(found: Sequence[Fit]) -> list[tuple[str, ...]]:
    """A line for every axis and policy."""
    lines: dict[tuple[str, str], dict[str, Fit]] = {}
    for x in found:
        lines.setdefault((x.axis, x.policy), {})[x.phase] = x
    cells = []
    for place, phases in sorted(lines.items(), key=lambda line: AXES.index(line[0][0])):
        last = phases["prefill"]
        shown = (str(phases[phase]) if phase in phases else "" for phase in PHASES)
        cells.append((*place, *shown, f"{last.first:.0f} to {last.last:.0f}", str(last.points)))
    return cells


def markdown(rows: Sequence[dict[str, str]], found: Sequence[Fit]) -> Iterator[str]:
    """The table of benchmarks/README.md, line by line: exponents, and the medians of the last point of each."""
    yield "| axis | policy | selection | prefill | decode | from | points | ms at the last |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for cells in exponents(found):
        last = [r for r in rows if (r["axis"], r["policy"]) == cells[:2]][-1]
        yield f"| {' | '.join((*cells, ' / '.join(_shown(last))))} |"


def _shown(row: dict[str, str]) -> tuple[str, ...]:
    """Medians of the phases."""
    times = (row[f"{phase}_median_ms"] for phase in PHASES)
    return tuple(f"{float(t):.3g}" if t and float(t) < 100 else f"{float(t):.0f}" if t else "" for t in times)


def write_fits(path: Path, rows: Sequence[dict[str, str]], found: Sequence[Fit]) -> None:
    """The exponents as JSON."""
    first = rows[0]
    where = {k: first[k] for k in ("device", "size", "dtype", "attention", "torch")}
    path.write_text(json.dumps({"measured": where, "fits": [x._asdict() for x in found]}, indent=1) + "\n")


def draw(path: Path, rows: Sequence[dict[str, str]], found: Sequence[Fit]) -> None:
    """A panel for every axis and phase that has lines, both scales logarithmic."""
    import matplotlib.pyplot as plt  # only drawing needs it

    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    shape = {"figsize": (5 * len(PHASES), 3.6 * len(axes)), "squeeze": False}
    figure, panels = plt.subplots(len(axes), len(PHASES), **shape)
    exponents = {(x.axis, x.policy, x.phase): str(x) for x in found}
    for line, axis in zip(panels, axes, strict=True):
        for panel, phase in zip(line, PHASES, strict=True):
            for policy, points in lines_of(rows, axis, phase).items():
                label = f"{policy.partition(':')[0]}: {exponents.get((axis, policy, phase), '-')}"
                color = f"C{policies.index(policy)}"
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, color=color)
            panel.set(xscale="log", yscale="log", xlabel=UNITS[axis], ylabel="ms", title=phase)
            panel.legend(fontsize=7, title="exponent", title_fontsize=7)
            panel.grid(alpha=0.3)
    first = rows[0]
    figure.suptitle(
        f"{first['device']}; {first['size']} decoder, {first['dtype']}, {first['attention']}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)
