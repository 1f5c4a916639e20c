"""The extension builds without a GPU, its kernels need what the kept table says and do not spill, and it loads."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import resources

ROOT = Path(__file__).parents[2]
ARCHITECTURES = runpy.run_path(str(ROOT / "csrc" / "build.py"))["ARCHITECTURES"]

NVCC = resources.nvcc()

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


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
def test_extension_builds_spills_nothing_and_loads(tmp_path):
    """One test, as one build serves it all."""
    report = resources.build_extension(tmp_path)
    library = tmp_path / "vlmprune" / "_C.abi3.so"
    assert code_in(library) == {*(f"sm_{a.removesuffix('a')}.cubin" for a in ARCHITECTURES), "sm_80.ptx"}
    load = [sys.executable, "-P", "-c", LOAD, library]
    out = subprocess.run(load, capture_output=True, text=True, check=True).stdout
    refused = re.findall(r"'_vlmprune_C::(\S+)' with arguments from the 'CPU' backend", out)
    assert refused == ["select_topk.int", "select_topk", "gather_tokens", "compact_kv"]

    rows = resources.cuda_rows(report)
    assert {row["target"] for row in rows} == {f"sm_{a}" for a in ARCHITECTURES}
    assert [row for row in rows if (row["spill_stores"], row["spill_loads"]) != ("0", "0")] == []
    assert set(re.findall(r"(\d+) bytes stack frame", report)) == {"0"}
    table = resources.cuda_table(NVCC)
    if not table.exists():
        pytest.skip(f"no table is kept for nvcc {NVCC}")
    assert rows == resources.read(table), "the table is out of date: make resources"


def code_in(library):
    """What a GPU may load: machine code of one architecture, or PTX for all from one on."""
    triton = Path(importlib.util.find_spec("triton").origin).parent
    cuobjdump = triton / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run(
        [cuobjdump, "-lelf", "-lptx", library], capture_output=True, text=True, check=True
    )
    # Older ones leave out the "a" of an architecture's own features, which the resources below name too.
    return {name.replace("a.", ".") for name in re.findall(r"sm_\w+\.(?:cubin|ptx)", listed.stdout)}
