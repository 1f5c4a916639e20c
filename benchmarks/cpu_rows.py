"""Rows measured on a CPU: which machine they are of, the table on the terminal and the CSV in ``results/``."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
REFUSED = 77  # exit code of a benchmark that cannot run here


def machine() -> dict[str, Any]:
    """What a time depends on besides the code."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write them in place of what was there, each with its machine."""
    whole = [machine() | row for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(whole[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(whole)


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Some columns as a Markdown table."""
    print(f"| {' | '.join(columns)} |")
    print(f"| {' | '.join(['---', *['---:'] * (len(columns) - 1)])} |")
    for row in rows:
        print(f"| {' | '.join(str(row[name]) for name in columns)} |")
