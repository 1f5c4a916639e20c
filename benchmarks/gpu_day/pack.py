"""Makes the folder that a machine without network is given: the CUDA extension, compiled Triton kernels, flash-colreduce.

    TRITON_INTERPRET=0 python -P benchmarks/gpu_day/pack.py build/gpu_day

Kernels are those of every benchmark case in bf16, compiled for sm_90 by the Triton that runs this: it has to be the version of
the machine. Nothing here needs a GPU; what cannot be made is said, and the machine makes it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import compiler
from triton.runtime.cache import get_cache_manager, triton_key

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ only: a checkout must stay off the path

from gpu_day import kit
from micro.inputs import Inputs
from micro.shapes import SHAPES, TINY, Shape
from micro.stub import launching
from micro.sweep import Sweep

CPU = torch.device("cpu")
SHAPE_NAMES = {shape.name: shape for shape in (TINY, *SHAPES)}


class EmptyInputs(Inputs):
    """The shapes and layouts of ``Inputs``; nobody looks at the numbers, so none are drawn."""

    def draw(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype)

    @cached_property
    def lse(self) -> Tensor:
        return torch.empty(self.query.shape[:3])


def compiled(shape: Shape) -> dict[str, dict[str, bytes]]:
    """The kernels of every case at a shape: rest of Triton's key -> files by name."""
    with launching(), _noted_keys() as keys:
        for case, setting in Sweep(CPU, [shape], [torch.bfloat16], (1, 64), (), 0.0).settings():
            x = EmptyInputs(setting)
            case.run(x)
            for plan in case.ours:
                plan.run(x)
    return {key.removeprefix(f"{triton_key()}-"): _files(key, name) for key, name in keys.items()}


@contextmanager
def _noted_keys() -> Iterator[dict[str, str]]:
    """Key -> name of every kernel that Triton compiles, or finds compiled."""
    keys: dict[str, str] = {}
    make = compiler.get_cache_key

    def noted(src: Any, *args: Any, **named: Any) -> str:
        key = make(src, *args, **named)
        keys[key] = src.name
        return key

    with mock.patch.object(compiler, "get_cache_key", noted):
        yield keys


def _files(key: str, name: str) -> dict[str, bytes]:
    """What running a kernel takes: its machine code and what Triton knows of it."""
    group = get_cache_manager(kit.cache_name(key)).get_group(f"{name}.json")
    assert group is not None, f"{name} was compiled, but is not in Triton's cache"
    return {
        file: Path(path).read_bytes()
        for file, path in group.items()
        if Path(path).suffix in (".json", ".cubin")
    }


def pack_kernels(folder: Path, shapes: Sequence[Shape], workers: int) -> None:
    """Compile, and file, the kernels of all shapes."""
    start, kernels = time.perf_counter(), {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for found in pool.map(compiled, shapes):
            kernels |= found
    kit.KernelStore(folder / kit.KERNELS).write(kernels)
    print(f"{len(kernels)} kernels in {time.perf_counter() - start:.0f} s")


def pack_library(folder: Path) -> None:
    """Build the extension, unless it is there."""
    if kit.has_library(folder):
        print("the CUDA extension of these sources is there")
    elif shutil.which("nvcc") is None:
        print("no CUDA extension: nvcc is not there")
    else:
        start = time.perf_counter()
        kit.build_library(folder)
        print(f"built the CUDA extension in {time.perf_counter() - start:.0f} s")


def pack_package(folder: Path) -> None:
    """Unpack the package in pure Python that some goals compare with, at the version that the benchmarks ask for."""
    project = tomllib.loads((kit.ROOT / "pyproject.toml").read_text())["project"]
    (package,) = [p for p in project["optional-dependencies"]["bench"] if p.startswith("flash-colreduce")]
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--upgrade")
    subprocess.run([*pip, "--target", folder / "site", package], check=True)
    print(package)


def checkout() -> Iterator[Path]:
    """What git does not ignore, as far as it is there: see README.md for what may be left out."""
    git = ("git", "-C", kit.ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(git, check=True, capture_output=True).stdout.decode().split("\0")
    return filter(Path.is_file, (kit.ROOT / name for name in names if name))


def size_of(paths: Iterable[Path]) -> float:
    """MiB."""
    return sum(path.stat().st_size for path in paths) / 2**20


def main() -> int:
    """Make everything."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPE_NAMES, default=[*SHAPE_NAMES], help="of kernels")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    chosen = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("expected TRITON_INTERPRET=0, got the interpreter")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    kit.stamp(chosen.folder)
    pack_library(chosen.folder)
    pack_package(chosen.folder)
    pack_kernels(chosen.folder, [SHAPE_NAMES[name] for name in chosen.shapes], chosen.workers)
    kit_size, rest = size_of(path for path in chosen.folder.rglob("*") if path.is_file()), size_of(checkout())
    print(f"{chosen.folder}: {kit_size:.1f} MiB, and {rest:.1f} MiB of checkout travel with it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
