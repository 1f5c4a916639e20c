"""Registers, spills and shared memory of every kernel that the compile tests launch, and of the CUDA C++ kernels.

Run as a script it rewrites the tables of the installed Triton and nvcc: make resources
"""

from __future__ import annotations

import csv
import importlib
import multiprocessing
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import triton
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

from helpers import offline

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = RESULTS / f"kernel_resources_triton-{triton.__version__}.csv"
TARGETS = (80, 90, 100, 120, "gfx942")
COLUMNS = [
    "launch",
    "target",
    "kernel",
    "warps",
    "registers",
    "spill_stores",
    "spill_loads",
    "shared",
    "note",
]
CUDA_KERNEL = re.compile(
    r"entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


@cache
def launches():
    """Name -> launch, of every compile test that keeps a table of LAUNCHES."""
    found = {}
    for path in sorted((ROOT / "tests" / "compile").glob("test_offline_compile*.py")):
        for name, launch in runpy.run_path(str(path))["LAUNCHES"].items():
            assert name not in found, f"two launches are called {name!r}"
            found[name] = launch
    return found


def rows_of(name, target, clean=False):
    """Table rows of one launch for one target, which is ``clean`` or raises; an AMD target's refusal is a row that says why."""
    compile_launches = offline.compile_clean if clean else offline.compile_launches
    try:
        compiled = compile_launches(launches()[name], target)
    except CompilationError as error:
        if isinstance(target, int):
            raise
        while error.__cause__ is not None:
            error = error.__cause__
        why = str(error).strip().splitlines()[-1]
        return [dict.fromkeys(COLUMNS, "") | {"launch": name, "target": target, "note": f"refused: {why}"}]
    label = f"sm_{target}" if isinstance(target, int) else target
    values = [
        (name, label, c.name, c.warps, c.registers, c.spill_stores, c.spill_loads, c.shared, "")
        for c in compiled
    ]
    return [dict(zip(COLUMNS, map(str, row), strict=True)) for row in values]


def rows_for(target):
    """Table rows of every launch for one target."""
    return [row for name in launches() for row in rows_of(name, target)]


def kernel_names():
    """The jitted entry points of the kernel files: functions called ..._kernel."""
    import vlmprune.triton_kernels as package

    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, JITFunction) and value.__name__.endswith("_kernel"):
                yield value.__name__


def nvcc():
    """The version of nvcc, or None."""
    if shutil.which("nvcc") is None:
        return None
    out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", out).group(1)


def cuda_table(version):
    """Where the rows of this nvcc are kept."""
    return RESULTS / f"kernel_resources_nvcc-{version}.csv"


def build_extension(folder):
    """Build the CUDA extension in a folder and return what ptxas says about its kernels, one after the other."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder]
    asked = {"VLMPRUNE_BUILD_CUDA": "1", "NVCC_APPEND_FLAGS": "-Xptxas=-v --threads=1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def cuda_rows(report):
    """Table rows of the extension's kernels; dynamic shared memory, which depends on the input, is not counted."""
    rows = {}
    for found in CUDA_KERNEL.finditer(report):  # a kernel that two files use is there twice
        kernel = subprocess.run(["c++filt", found["kernel"]], capture_output=True, text=True, check=True)
        name = re.sub(r"^.*?(\w+(?:<.*>)?)\(.*$", r"\1", kernel.stdout.strip())
        numbers = (found["registers"], found["stores"], found["loads"], found["shared"] or "0")
        row = (name.partition("_kernel")[0], found["target"], name, "", *numbers, "")
        rows[name, found["target"]] = dict(zip(COLUMNS, row, strict=True))
    return sorted(rows.values(), key=lambda row: (row["kernel"], int(re.sub(r"\D", "", row["target"]))))


def read(path):
    """Rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    """Replace a table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    spilling = sum(row["spill_stores"] not in ("", "0") for row in rows)
    refused = sum(row["note"] != "" for row in rows)
    print(f"{path.relative_to(ROOT)}: {len(rows)} kernels, {spilling} spill, {refused} refused")  # noqa: T201


def main():
    """Compile everything, two targets at a time, and write the tables."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        by_target = list(pool.map(rows_for, TARGETS))
    position = {name: i for i, name in enumerate(launches())}
    rows = [row for rows in by_target for row in rows]
    write(TABLE, sorted(rows, key=lambda row: position[row["launch"]]))
    if (version := nvcc()) is not None:
        with tempfile.TemporaryDirectory() as folder:
            write(cuda_table(version), cuda_rows(build_extension(folder)))


if __name__ == "__main__":
    main()
