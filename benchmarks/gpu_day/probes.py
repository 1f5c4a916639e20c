"""The stages of first_light.py that are questions of their own: ``python benchmarks/gpu_day/probes.py NAME``; each prints its answer.

Exit code 77 means that a stage cannot run here, and its output says why.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ only: a checkout must stay off the path
if "--no-memory-pool" in sys.argv:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # which PyTorch reads when it is imported

import torch
from gpu_day import kit
from gpu_day.correct import check, run_checks
from gpu_day.replays import replays
from micro import foreign
from micro.cases import CASES
from micro.ceilings import gaps, measure_ceilings
from micro.inputs import Inputs
from micro.restart import Journal
from micro.rows import read
from micro.shapes import DTYPES, SHAPES, TINY, Setting

import vlmprune
from vlmprune import ops
from vlmprune.ops._dispatch import TABLES, explain

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
REFUSED = 77
PACKAGES = ("torch", "triton", "transformers", "numpy", "setuptools", "pytest", "xdist", "hypothesis", "rich")
PACKAGES += ("typer", "matplotlib", "flash_attn", "flash_colreduce")
TOOLS = ("cc", "gcc", "clang", "nvcc", "compute-sanitizer", "ncu")  # Triton needs one of the first three
KERNELS = ("cuda", "triton", "plan")
PROFILED = ("prune_tokens", "select_topk", "gather_tokens")
MICROBENCH = str(Path(__file__).parents[1] / "microbench.py")


def info(chosen: argparse.Namespace) -> int:
    """Versions, device, the backend each op uses here; then copy bandwidth, matrix rates, launch and graph gaps."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        found = importlib.util.find_spec(name) is not None
        print(name, getattr(importlib.import_module(name), "__version__", "unknown") if found else "missing")
    for name in TOOLS:
        print(name, shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}") or "missing")
    if DEVICE.type == "cuda":
        print(torch.cuda.get_device_properties(DEVICE))
    if shutil.which("nvidia-smi") is not None:
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)
    for op in sorted(TABLES):
        states = [f"{name}: {why or 'usable'}" for name, why in explain(op, DEVICE)]
        print(f"{op}\n  " + "\n  ".join(states))
    found = measure_ceilings(DEVICE, [DTYPE, torch.float32], 0.05 if chosen.tiny else 0.5)
    print(f"copy: {found.copy / 1e9:.1f} GB/s, read plus written")
    for dtype, rate in found.matmul.items():
        print(f"matrix product {dtype}: {rate / 1e12:.2f} TFLOP/s")
    for name, microseconds in gaps(DEVICE).items() if DEVICE.type == "cuda" else ():
        print(f"{name}: {microseconds:.2f} us")
    return 0


def build(chosen: argparse.Namespace) -> int:
    """What was made beforehand is put to use; what is missing of it is made here, or said to be missing."""
    print(kit.KernelStore(chosen.kit / kit.KERNELS).lay_out())
    if importlib.util.find_spec("flash_colreduce") is None:
        print("flash-colreduce is not there: the goals that name it stay unmeasured")
    folder = Path(vlmprune.__file__).parent
    if kit.has_library(folder):
        try:
            torch.ops.load_library(str(folder / kit.LIBRARY))
        except OSError as error:
            print(f"the CUDA extension that was built beforehand does not load, so it is built here: {error}")
        else:
            print("the CUDA extension was built beforehand, and loads")
            return 0
    else:
        print("no CUDA extension of these sources was built beforehand: it is built here")
    return _build_extension(folder, chosen.tiny)


def _build_extension(folder: Path, dry: bool) -> int:
    for needed in ("nvcc", "setuptools"):
        if not (
            shutil.which(needed)
            or shutil.which(f"/usr/local/cuda/bin/{needed}")
            or importlib.util.find_spec(needed)
        ):
            print(f"{needed} is not there")
            return REFUSED
    if dry:
        print("not in a dry run")
        return 0
    start = time.perf_counter()
    kit.build_library(folder)
    print(f"built in {time.perf_counter() - start:.0f} s")
    for op in sorted(TABLES):
        print(op, dict(explain(op, DEVICE)).get("cuda", "has no CUDA backend") or "runs on the extension")
    return 0


def calls(chosen: argparse.Namespace) -> int:
    """One call of every case by every backend with kernels, checked, at a tiny size: for compute-sanitizer to look at."""
    backends = chosen.backends or (KERNELS if DEVICE.type == "cuda" else ())
    return check(TINY, DEVICE, DTYPE, Journal(None), backends)


def checks(chosen: argparse.Namespace) -> int:
    """The same at the real shapes, one process each, which fill Triton's cache side by side."""
    dtype = [] if chosen.dtype is None else ["--dtype", chosen.dtype]
    if chosen.shape is None and not chosen.tiny:
        return run_checks([sys.executable, __file__, "check", *dtype], (TINY, *SHAPES), chosen.journal)
    shape = TINY if chosen.tiny else next(s for s in (TINY, *SHAPES) if s.name == chosen.shape)
    return check(shape, DEVICE, DTYPES[chosen.dtype] if chosen.dtype else DTYPE, Journal(chosen.journal))


def host(chosen: argparse.Namespace) -> int:
    """Microseconds of the host until a call returns, with nothing to wait for: what the GPU must hide."""
    x = Inputs(Setting(TINY if chosen.tiny else SHAPES[0], DTYPE, 1, DEVICE))
    one, lists = torch.zeros(1, device=DEVICE), dict(rows=x.rows, columns=x.columns, lse=x.lse)
    given = (x.query, x.key, x.tensors)
    rounds, times = (1, 1) if chosen.tiny else (20, 50)
    with ops.use_backend("triton"):
        plan = ops.PrunePlan(*given, keep=x.shape.keep, **lists)
        ways: dict[str, Callable[[], Any]] = {
            "one small PyTorch op": lambda: one.fill_(1),
            "a bound plan": plan.bind(*given, **lists),
            "PrunePlan.run": lambda: plan.run(*given, **lists),
            "prune_tokens": lambda: ops.prune_tokens(*given, keep=x.shape.keep, **lists),
            "the same in plain PyTorch": lambda: foreign.prune(x),
        }
        for name, call in ways.items():
            print(f"{name}, {x.shape.name}: {_enqueued_us(call, rounds, times):.1f} us", flush=True)
    return 0


def _enqueued_us(call: Callable[[], object], rounds: int, times: int) -> float:
    """Median over rounds of the mean of a call; so few in a row that none waits for room in the queue."""
    means = []
    for _round in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(times):
            call()
        means.append(1e6 * (time.perf_counter() - start) / times)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    return median(means[1:])  # the first warms up


def profiled(chosen: argparse.Namespace) -> int:
    """The launches of scoring with selection, of selection and of gathering, between the marks that ncu waits for."""
    shapes = [TINY] if chosen.tiny else [SHAPES[1], SHAPES[3]]
    cases = [case for case in CASES if case.name in PROFILED]
    for shape in shapes:
        x = Inputs(Setting(shape, DTYPE, 1, DEVICE))
        for case in cases:
            with ops.use_backend("triton"):
                if DEVICE.type == "cuda":
                    case.run(x)
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                print(f"{case.name}, {shape.name}", flush=True)
                case.run(x)
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
    return 0


def environment(chosen: argparse.Namespace) -> int:
    """The whole stage with an environment variable at each of its values, in processes of their own, there and back."""
    paths: dict[str, Path] = {value: Path(f"{chosen.scratch}.{value}.csv") for value in chosen.values}
    small = ("--shapes", "tiny", "--seconds", "0.01", "--providers", "reference")
    size = small if chosen.tiny else ("--seconds", "0.1", "--modes", "graph", "--providers", "plan")
    for path in paths.values():
        path.unlink(missing_ok=True)
    for value in [*paths][:1] if chosen.tiny else (*paths, *reversed(paths)):
        line = (
            "--no-plots",
            "--rows",
            "1",
            "--cases",
            "prune_tokens",
            "prune_scored",
            *size,
            "--csv",
            paths[value],
        )
        subprocess.run(
            [sys.executable, MICROBENCH, *line], env=os.environ | {chosen.variable: value}, check=True
        )
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for value, path in paths.items():
        for row in read(path) if path.exists() else ():
            if row["median_us"]:
                where = found.setdefault((row["case"], row["shape"]), {value: [] for value in paths})
                where[value].append(float(row["median_us"]))
    for where, times in found.items():
        cells = [
            f"{chosen.variable}={value} {' and '.join(f'{t:.4g}' for t in took)} us"
            for value, took in times.items()
        ]
        print(
            f"{', '.join(where)}: {', '.join(cells)}; best {min(times, key=lambda value: sum(times[value]))}"
        )
    return 0 if found else 1


def arguments() -> argparse.Namespace:
    """Command line."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tiny", action="store_true", help="a small size, to try the stage itself")
    probes = {}
    for function in (info, build, calls, host, profiled, environment):
        probes[function.__name__] = function
    probes |= {"check": checks, "replays": replays_of}
    sub = parser.add_subparsers(dest="probe", required=True)
    add = {
        name: sub.add_parser(name, help=f.__doc__, parents=[common]).add_argument
        for name, f in probes.items()
    }
    add["build"]("--kit", type=Path, required=True, help="folder of what was made beforehand")
    add["calls"]("--no-memory-pool", action="store_true", help="each tensor has memory of its own")
    add["calls"]("--backends", nargs="+", default=(), help="these only")
    add["check"]("--shape", choices=[shape.name for shape in (TINY, *SHAPES)], help="this one only")
    add["check"]("--dtype", choices=DTYPES, help="of the operands")
    for name in ("check", "replays"):
        add[name]("--journal", type=Path, help="file of what was begun, which is not done again")
    add["environment"]("variable")
    add["environment"]("values", nargs="+")
    add["environment"](
        "--scratch", type=Path, default=Path("environment"), help="rows go to SCRATCH.VALUE.csv"
    )
    chosen = parser.parse_args()
    chosen.run = probes[chosen.probe]
    return chosen


def replays_of(chosen: argparse.Namespace) -> int:
    """Graph replays of every fused case, two inputs in turn: bits that differ are counted on the device."""
    shapes = [TINY] if chosen.tiny else SHAPES
    return replays(shapes, DEVICE, DTYPE, 4 if chosen.tiny else 200, Journal(chosen.journal))


def main() -> int:
    """Run one stage."""
    chosen = arguments()
    return chosen.run(chosen)


if __name__ == "__main__":
    sys.exit(main())
