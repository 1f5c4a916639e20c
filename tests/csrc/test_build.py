"""Each CUDA kernel compiles without spills, and the extension builds and loads on a machine without a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ["80", "90a", "100a"]
OPS = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")

KERNEL = re.compile(
    r"entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<memory>\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads)",
    re.DOTALL,
)

LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
op = torch.ops._vlmprune_C.select_topk
print(*op.overloads())
for keep in 1, torch.tensor([1]):
    try:
        op(torch.zeros(1, 4), keep, None, 4)
    except NotImplementedError as error:
        print(error)
"""


@pytest.mark.parametrize("op", OPS)
def test_kernels_do_not_spill(op, tmp_path):
    source = tmp_path / f"{op}.cu"
    source.write_text(f'#include "vlmprune/{op}.cuh"\nauto* const entry = &vlmprune::launch_{op};\n')
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [NVCC, "-std=c++20", "-O3", "-Xptxas=-v", "-I", ROOT / "csrc/include", *targets]
    command += ["-c", source, "-o", tmp_path / "kernels.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels = list(KERNEL.finditer(done.stdout + done.stderr))
    assert {k["architecture"] for k in kernels} == set(ARCHITECTURES)
    nothing = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert [(k["name"], k["architecture"], k["memory"]) for k in kernels if k["memory"] != nothing] == []


@pytest.mark.slow
def test_extension_builds_and_loads(tmp_path):
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    subprocess.run(build, cwd=ROOT, env=os.environ | {"VLMPRUNE_BUILD_CUDA": "1"}, check=True)
    library = tmp_path / "vlmprune" / "_C.abi3.so"
    load = [sys.executable, "-P", "-c", LOAD, library]
    out = subprocess.run(load, capture_output=True, text=True, check=True).stdout
    assert out.startswith("default int\n")
    assert (
        len(re.findall(r"'_vlmprune_C::select_topk(?:\.int)?' with arguments from the 'CPU' backend", out))
        == 2
    )
