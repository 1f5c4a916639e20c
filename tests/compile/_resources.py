"""Registers, spills and shared memory of every kernel that the compile tests launch, and of the CUDA C++ kernels.

Run as a script it rewrites the tables of the installed Triton and nvcc: TRITON_INTERPRET=0 python -P tests/compile/_resources.py
"""

from __future__ import annotations

import csv
import importlib.util
import multiprocessing
import pkgutil
import re
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

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = RESULTS / f"kernel_resources_triton-{triton.__version__}.csv"
TARGETS = (80, 90, 100, "gfx942")
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
CUDA_TARGETS = ("80", "90a", "100a")
CUDA_KERNEL = re.compile(
    r"entry function '(?P<kernel>\w+)' for 'sm_(?P<target>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def load(path):
    """A module of this folder, by its path: the folder is no package."""
    name = f"compile_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@cache
def launches():
    """Name -> launch, of every compile test that keeps a table of LAUNCHES."""
    found = {}
    for path in sorted(HERE.glob("test_offline_compile*.py")):
        for name, launch in load(path).LAUNCHES.items():
            assert name not in found, f"two launches are called {name!r}"
            found[name] = launch
    return found


def rows_of(name, target):
    """Table rows of one launch for one target; an AMD target that refuses a kernel gives a row that says why."""
    try:
        compiled = load(HERE / "_offline.py").compile_launches(launches()[name], target)
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
    """(path, version) of nvcc, or None."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    out = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return path, re.search(r"release (\d+\.\d+)", out).group(1)


def cuda_table(version):
    """Where the rows of this nvcc are kept."""
    return RESULTS / f"kernel_resources_nvcc-{version}.csv"


def cuda_rows(compiler):
    """Table rows of the kernels in csrc/; dynamic shared memory, which depends on the input, is not counted."""
    ops = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
    rows = []
    for op in ops:
        for found in CUDA_KERNEL.finditer(_ptxas_report(compiler, op)):
            kernel = subprocess.run(["c++filt", found["kernel"]], capture_output=True, text=True, check=True)
            name = re.sub(r"^.*?(\w+(?:<.*>)?)\(.*$", r"\1", kernel.stdout.strip())
            numbers = (found["registers"], found["stores"], found["loads"], found["shared"] or "0")
            row = (op, f"sm_{found['target']}", name, "", *numbers, "")
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    return sorted(rows, key=lambda row: (row["launch"], row["kernel"], CUDA_TARGETS.index(row["target"][3:])))


def _ptxas_report(compiler, op):
    """What ptxas -v says about the kernels of one header."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{op}.cu"
        source.write_text(f'#include "vlmprune/{op}.cuh"\nauto* const entry = &vlmprune::launch_{op};\n')
        targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS]
        command = [compiler, "-std=c++20", "-O3", "-Xptxas=-v", "--threads=0", "-I", ROOT / "csrc/include"]
        command += [*targets, "-c", source, "-o", Path(folder) / "kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


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
    """Compile everything, one process a target, and write the tables."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        by_target = list(pool.map(rows_for, TARGETS))
    position = {name: i for i, name in enumerate(launches())}
    rows = [row for rows in by_target for row in rows]
    write(TABLE, sorted(rows, key=lambda row: position[row["launch"]]))
    found = nvcc()
    if found is not None:
        write(cuda_table(found[1]), cuda_rows(found[0]))


if __name__ == "__main__":
    main()
