"""The kept tables of registers, spills and shared memory are what the compilers in use produce.

`make resources` rewrites them. Run in a process of its own: TRITON_INTERPRET=0 python -m pytest tests/compile.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import triton

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter cannot compile; run with TRITON_INTERPRET=0", allow_module_level=True)

spec = importlib.util.spec_from_file_location("_resources", Path(__file__).with_name("_resources.py"))
resources = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = resources
spec.loader.exec_module(resources)

NEWEST = "3.9.0"  # the triton of requirements/dev.txt
STALE = "the table is out of date: make resources"

if not resources.TABLE.exists():
    pytest.skip(f"no table is kept for triton {triton.__version__}", allow_module_level=True)


@pytest.fixture(scope="module")
def kept():
    """(launch, target) -> rows."""
    out = {}
    for row in resources.read(resources.TABLE):
        out.setdefault((row["launch"], row["target"]), []).append(row)
    return out


@pytest.mark.parametrize("target", resources.TARGETS)
@pytest.mark.parametrize("launch", resources.launches())
def test_a_launch_needs_what_the_table_says(kept, launch, target):
    rows = resources.rows_of(launch, target)
    assert rows == kept.get((launch, rows[0]["target"])), STALE


def test_the_table_lists_every_launch_once(kept):
    labels = {f"sm_{t}" if isinstance(t, int) else t for t in resources.TARGETS}
    assert set(kept) == {(launch, label) for launch in resources.launches() for label in labels}, STALE


def test_every_kernel_is_in_the_table(kept):
    """A new kernel needs a launch in one of the compile tests."""
    named = {row["kernel"] for rows in kept.values() for row in rows}
    assert {name for name in resources.kernel_names() if name not in named} == set()


def test_nothing_spills_on_nvidia_with_the_newest_triton():
    rows = resources.read(resources.TABLE.with_name(f"kernel_resources_triton-{NEWEST}.csv"))
    on_nvidia = [row for row in rows if row["target"].startswith("sm_")]
    assert on_nvidia and {row["note"] for row in on_nvidia} == {""}
    assert [row for row in on_nvidia if (row["spill_stores"], row["spill_loads"]) != ("0", "0")] == []


def test_cuda_kernels_need_what_the_table_says():
    found = resources.nvcc()
    if found is None:
        pytest.skip("nvcc is not on PATH")
    path, version = found
    if not resources.cuda_table(version).exists():
        pytest.skip(f"no table is kept for nvcc {version}")
    rows = resources.cuda_rows(path)
    assert rows == resources.read(resources.cuda_table(version)), STALE
    assert rows and all((row["spill_stores"], row["spill_loads"]) == ("0", "0") for row in rows)
