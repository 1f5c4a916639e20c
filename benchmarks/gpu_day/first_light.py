"""The stages of first_light.sh that are Python: ``python benchmarks/gpu_day/first_light.py STAGE``; each prints its result.

Exit code 77 means that the stage cannot run here, and its output says why.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ only: a checkout must stay off the path

from micro.cases import CASES
from micro.ceilings import gaps, measure_ceilings
from micro.clock import capture
from micro.gate import FAILURES, failed
from micro.inputs import Inputs
from micro.shapes import DTYPES, SHAPES, TINY, Setting, Shape

from vlmprune.ops._dispatch import TABLES, explain

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFUSED = 77
PACKAGES = ("torch", "triton", "transformers", "numpy", "setuptools", "pytest", "xdist", "hypothesis", "rich")
PACKAGES += ("typer", "matplotlib", "flash_attn", "flash_colreduce")
TOOLS = ("cc", "gcc", "clang", "nvcc", "compute-sanitizer", "ncu")  # Triton needs one of the first three
SHAPE_NAMES = [shape.name for shape in (TINY, *SHAPES)]
MOST_PAIRS = 4096  # visual tokens up to which all pairs are compared


def info(tiny: bool) -> int:
    """Versions, device, and the backend each op uses here."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        found = importlib.util.find_spec(name) is not None
        print(name, getattr(importlib.import_module(name), "__version__", "unknown") if found else "missing")
    for name in TOOLS:
        print(name, shutil.which(name) or "missing")
    if DEVICE.type == "cuda":
        print(torch.cuda.get_device_properties(DEVICE))
        if shutil.which("nvidia-smi") is not None:
            print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)
    for op in sorted(TABLES):
        states = [f"{name}: {why or 'usable'}" for name, why in explain(op, DEVICE)]
        print(f"{op}\n  " + "\n  ".join(states))
    return 0


def ceilings(tiny: bool) -> int:
    """Copy bandwidth, matrix rates, launch and graph gaps."""
    dtypes = [torch.float32] if DEVICE.type == "cpu" else list(DTYPES.values())
    found = measure_ceilings(DEVICE, dtypes, 0.05 if tiny else 0.5)
    print(f"copy: {found.copy / 1e9:.1f} GB/s, read plus written")
    for dtype, rate in found.matmul.items():
        print(f"matrix product {dtype}: {rate / 1e12:.2f} TFLOP/s")
    if DEVICE.type == "cuda":
        for name, microseconds in gaps(DEVICE).items():
            print(f"{name}: {microseconds:.2f} us")
    return 0


def build(tiny: bool) -> int:
    """The CUDA extension, into the package that is imported."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        print("nvcc is not there")
        return REFUSED
    if importlib.util.find_spec("setuptools") is None:
        print("setuptools, which csrc/build.py imports, is not there")
        return REFUSED
    import vlmprune

    target = Path(vlmprune.__file__).parent / "_C.abi3.so"
    command = runpy.run_path(str(ROOT / "csrc" / "build.py"))["command"](target)
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT / "csrc", check=False).returncode
    print(f"{' '.join(command)}\nexit {code} after {time.perf_counter() - start:.0f} s")
    if code == 0:
        for op in sorted(TABLES):
            print(op, dict(explain(op, DEVICE)).get("cuda", "has no CUDA backend") or "runs on the extension")
    return code


def replays(tiny: bool) -> int:
    """A thousand graph replays of every fused case: bits that differ from the first are counted on the device."""
    wrong = 0
    for shape in [TINY] if tiny else SHAPES:
        x = Inputs(Setting(shape, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32, 64, DEVICE))
        for case in CASES:
            if case.op not in (
                "received_attention",
                "row_lse",
                "select_topk",
                "prune_tokens",
                "prune_scored",
            ):
                continue
            for provider in case.own():
                if provider.why_not(x) is None:
                    differing = _replay(lambda run=provider.run, x=x: run(x), 10 if tiny else 1000)
                    print(
                        f"{case.name}, {shape.name}, {provider.name}: {differing} replays differ", flush=True
                    )
                    wrong += differing
    return int(wrong > 0)


def _replay(run: Callable[[], Any], times: int) -> int:
    """How many of ``times`` repetitions give other bits; the host waits once, at the end."""
    kept: list[Any] = []
    if DEVICE.type == "cuda":
        graph = capture(lambda: kept.append(run()))
        kept, again = kept[-1:], graph.replay
        again()
    else:
        kept.append(run())

        def again() -> None:
            kept[0] = run()

    first = [_bits(t).clone() for t in _tensors(kept[0])]
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(times):
        again()
        same = [(_bits(t) == want).all() for t, want in zip(_tensors(kept[0]), first, strict=True)]
        differing += ~torch.stack(same).all()
    return int(differing)


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in _tensors(part)]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def calls(tiny: bool) -> int:
    """One call of every case by every backend of ours, checked, at a tiny size: for compute-sanitizer to look at."""
    return _check(TINY)


def check(tiny: bool) -> int:
    """The same at the real shapes, one process each: is anything wrong? It leaves Triton's cache full, too."""
    command = [sys.executable, __file__, "check", "--shape"]
    shapes = (TINY,) if tiny else (TINY, *SHAPES)
    running = [subprocess.Popen([*command, shape.name]) for shape in shapes]
    return max([abs(process.wait()) for process in running])


def _check(shape: Shape) -> int:
    """Gate every case at one shape and print how it went; 1 if one was wrong or broke."""
    bad = False
    for x in _checked_inputs(shape):
        for case in CASES:
            if (case.all_pairs and shape.visual > MOST_PAIRS) or (x.setting.rows > 1 and not case.scored):
                continue
            for provider in case.own():
                note = provider.why_not(x)
                try:
                    if note is None:
                        case.gate(x, provider.run)
                except FAILURES as error:
                    note, bad = failed(error), True
                what = f"{case.name}, {shape.name}, {x.dtype}, R={x.setting.n_rows}, {provider.name}"
                sys.stdout.write(f"{what}: {note or 'right'}\n")  # in one piece: other processes write, too
                sys.stdout.flush()
    return int(bad)


def _checked_inputs(shape: Shape) -> Iterator[Inputs]:
    """What the later stages measure, first what they measure first."""
    dtypes = (torch.float32,) if DEVICE.type == "cpu" else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for rows in (1, 64):
            yield Inputs(Setting(shape, dtype, rows, DEVICE))


STAGES = {f.__name__: f for f in (info, ceilings, build, check, replays, calls)}


def main() -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--tiny", action="store_true", help="a small size, to try the stage itself")
    parser.add_argument("--shape", choices=SHAPE_NAMES, help="check this one only")
    chosen = parser.parse_args()
    if chosen.shape is not None:
        return _check((TINY, *SHAPES)[SHAPE_NAMES.index(chosen.shape)])
    return STAGES[chosen.stage](chosen.tiny)


if __name__ == "__main__":
    sys.exit(main())
