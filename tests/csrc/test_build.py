"""Each CUDA kernel compiles without spills, and the extension builds and loads on a machine without a GPU."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = runpy.run_path(str(ROOT / "csrc" / "build.py"))["ARCHITECTURES"]
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
ops = torch.ops._vlmprune_C
index, scores = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 4)
for call in (
    lambda: ops.select_topk(scores, 1, None, 4),
    lambda: ops.select_topk(scores, torch.tensor([1]), None, 4),
    lambda: ops.gather_tokens([scores], index),
    lambda: ops.compact_kv([scores[None]], index),
):
    try:
        call()
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
    refused = re.findall(r"'_vlmprune_C::(\S+)' with arguments from the 'CPU' backend", out)
    assert refused == ["select_topk.int", "select_topk", "gather_tokens", "compact_kv"]
    assert code_in(library) == {*(f"sm_{a}.cubin" for a in ARCHITECTURES), "sm_80.ptx"}


def code_in(library):
    """What a GPU may load: machine code of one architecture, or PTX for all from one on."""
    cuobjdump = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run(
        [cuobjdump, "-lelf", "-lptx", library], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"sm_\w+\.(?:cubin|ptx)", listed.stdout))
