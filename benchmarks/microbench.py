"""Microbenchmarks of every op and backend against other ways to the same result: ``python benchmarks/microbench.py``.

Prints a table, appends one CSV row per result, draws plots. Without a GPU it times the CPU providers and says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from micro.cases import CASES
from micro.ceilings import Ceilings, measure_ceilings
from micro.clock import GPU_MODES, modes
from micro.plot import draw
from micro.restart import DeviceLostError, Journal, leave
from micro.rows import Row, append, slug
from micro.shapes import DTYPES, ROWS, SHAPES, TINY
from micro.sweep import Sweep
from micro.table import show

RESULTS = Path(__file__).parent / "results"
WITHOUT_GPU = """No CUDA device: these are CPU times. "reference" is our PyTorch reference, the only backend of ours that
is meant for a CPU; the figures say nothing about the kernels, which stay unmeasured."""


def arguments() -> argparse.Namespace:
    """Command line."""
    by_name = {shape.name: shape for shape in (*SHAPES, TINY)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--full", action="store_true", help="every shape, dtype, number of rows, provider and mode")
    add("--shapes", nargs="+", choices=by_name, help="prompts")
    add("--dtypes", nargs="+", choices=DTYPES, help="operand types")
    add("--rows", nargs="+", type=int, help="numbers of scoring rows")
    add("--modes", nargs="+", choices=GPU_MODES, help="see micro/clock.py")
    add("--cases", nargs="+", default=(), choices=sorted({c.name for c in CASES} | {c.op for c in CASES}))
    add("--providers", nargs="+", default=(), help="backends and others, by the name in the table")
    add("--seconds", type=float, help="per provider and mode")
    add("--csv", type=Path, help="rows are appended here (default: results/<device>.csv)")
    add("--no-plots", action="store_true", help="draw nothing")
    add("--journal", type=Path, help="file of what was begun, which is not measured again")
    chosen = parser.parse_args()
    if chosen.shapes:
        chosen.shapes = [by_name[name] for name in chosen.shapes]
    return chosen


def make_sweep(chosen: argparse.Namespace, device: torch.device) -> Sweep:
    """The defaults of this device, ``--full``, or what was asked for."""
    gpu, full = device.type == "cuda", chosen.full
    dtypes = chosen.dtypes or (list(DTYPES) if full else ["bf16"] if gpu else ["fp32"])
    return Sweep(
        device,
        shapes=chosen.shapes or (SHAPES if full or gpu else SHAPES[:1]),
        dtypes=[DTYPES[name] for name in dtypes],
        rows=chosen.rows or (ROWS if full or gpu else ROWS[:2]),
        modes=chosen.modes or (modes(device) if full else modes(device)[:1]),
        seconds=chosen.seconds or (0.2 if gpu else 0.5),
        cases=chosen.cases,
        providers=chosen.providers,
        slow_providers=full or bool(chosen.providers),
        journal=Journal(chosen.journal),
    )


def main() -> int:
    """Measure, print, draw; 1 if a provider was wrong or failed. A process that lost its device leaves the rest to another."""
    chosen = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sweep, path = make_sweep(chosen, device), chosen.csv or RESULTS / f"{slug(device)}.csv"
    measured: list[Row] = []
    try:
        _measure(sweep, path, measured)
    except DeviceLostError:
        print("the device is lost, and with it this process")
        leave()
    if device.type == "cpu":
        print(WITHOUT_GPU)
    if not chosen.no_plots:
        _plots(path, sweep.modes[0])
    return int(any(row.bad for row in measured))


def _measure(sweep: Sweep, path: Path, measured: list[Row]) -> None:
    """Append the rows to the file and to ``measured``, and print them, whatever ends it."""
    start = time.perf_counter()
    ceilings: Ceilings = measure_ceilings(sweep.device, list({*sweep.dtypes, torch.float32}), sweep.seconds)
    try:
        for row in sweep.run(ceilings):
            append(path, row)
            measured.append(row)
            print(".", end="", file=sys.stderr, flush=True)
    finally:
        print(file=sys.stderr)
        show(measured, f"{slug(sweep.device)}: copy {ceilings.copy / 1e9:.4g} GB/s")
        print(f"{len(measured)} rows in {time.perf_counter() - start:.0f} s, appended to {path}")


def _plots(path: Path, mode: str) -> None:
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install vlmprune[bench])")
        return
    for picture in draw(path, mode):
        print(f"drew {picture}")


if __name__ == "__main__":
    sys.exit(main())
