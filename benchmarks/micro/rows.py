"""One CSV row per result or refusal, with everything needed to know what was measured, and where."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from .cases import Case
from .ceilings import Ceilings
from .clock import Timing
from .inputs import Inputs
from .shapes import DTYPES

ROOT = Path(__file__).parents[2]
DESCRIBE = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*")
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Row:
    """A line of the CSV; an empty number is one that was not measured, and ``note`` says why."""

    date: str
    commit: str
    device: str
    driver: str
    cuda: str
    python: str
    torch: str
    triton: str
    case: str
    shape: str
    length: int
    visual: int
    kept: int
    dtype: str
    rows: int
    provider: str
    mode: str = ""
    runs: int | None = None
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    overhead_us: float | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    flops: int | None = None
    floor_us: float | None = None
    share_of_floor: float | None = None
    prefill_us: float | None = None
    share_of_prefill: float | None = None
    copy_gb_per_s: float | None = None
    matmul_tflops: float | None = None
    note: str = ""

    @property
    def bad(self) -> bool:
        """Whether the provider ran and was wrong or broke."""
        return self.note.startswith(("wrong result", "failed"))


def refused(case: Case, x: Inputs, provider: str, note: str) -> Row:
    """A provider that was not timed."""
    return Row(**machine(x.device), **_setting(case, x), provider=provider, note=note)


def result(case: Case, x: Inputs, provider: str, timing: Timing, ceilings: Ceilings) -> Row:
    """A provider that was."""
    traffic, work = case.traffic(x), case.work(x)
    floor, prefill = ceilings.floor_us(traffic, work, x.dtype), ceilings.prefill_us(x.setting)
    return Row(
        **machine(x.device),
        **_setting(case, x),
        provider=provider,
        mode=timing.mode,
        runs=timing.runs,
        median_us=_round(timing.median),
        p20_us=_round(timing.p20),
        p80_us=_round(timing.p80),
        overhead_us=_round(timing.overhead),
        bytes=traffic,
        gb_per_s=_round(traffic / timing.median / 1e3),
        flops=work,
        floor_us=_round(floor),
        share_of_floor=_round(floor / timing.median),
        prefill_us=_round(prefill),
        share_of_prefill=_round(timing.median / prefill),
        copy_gb_per_s=_round(ceilings.copy / 1e9),
        matmul_tflops=_round(ceilings.matmul[x.dtype] / 1e12),
    )


def append(path: Path, row: Row) -> None:
    """Write one row at once, so that a run that is cut off leaves what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a file, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The last measured row of each case, setting, provider and mode."""
    key = ("case", "shape", "dtype", "rows", "provider", "mode")
    newest = {tuple(row[k] for k in key): row for row in rows if row["median_us"]}
    return list(newest.values())


def slug(device: torch.device) -> str:
    """File name of the rows of a device."""
    return slug_of(machine(device)["device"])


def slug_of(device: str) -> str:
    """The same from what rows call the device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@cache
def machine(device: torch.device) -> dict[str, str]:
    """The columns that say where, when and with what."""
    triton = "none"
    if find_spec("triton") is not None:
        from triton import __version__ as triton
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or _command(*DESCRIBE),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }


def _command(*command: str) -> str:
    """First line of what a command prints; "unknown" if it is not there or fails."""
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.strip().partition("\n")[0]


def _setting(case: Case, x: Inputs) -> dict[str, str | int]:
    shape = x.shape
    return {
        "case": case.name,
        "shape": shape.name,
        "length": shape.length,
        "visual": shape.visual,
        "kept": shape.kept,
        "dtype": NAMES[torch.float32 if case.float32_only else x.dtype],
        "rows": x.setting.n_rows if case.scored else 0,
    }


def _round(x: float) -> float:
    return float(f"{x:.4g}")
