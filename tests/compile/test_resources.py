"""Every launch compiles for GPUs that are not there, without races, and needs what the kept table of registers and spills says.

`make resources` rewrites the table. Run in a process of its own: TRITON_INTERPRET=0 python -m pytest tests/compile.
"""

import pytest
import triton

from helpers import resources

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter cannot compile; run with TRITON_INTERPRET=0", allow_module_level=True)

STALE = "the table is out of date: make resources"
OLDEST, NEWEST = "3.6.0", "3.9.0"  # the tritons of requirements/oldest.txt and dev.txt


@pytest.fixture(scope="module")
def kept():
    """(launch, target) -> rows; empty for a Triton of which no table is kept."""
    out = {}
    for row in resources.read(resources.TABLE) if resources.TABLE.exists() else ():
        out.setdefault((row["launch"], row["target"]), []).append(row)
    return out


def pairs():
    """Each launch for the next target in turn, which is another one with another Triton, and for sm_90.

    Every other launch and sm_90 are slow. `make resources` compiles every launch for every target.
    """
    for i, launch in enumerate(resources.launches()):
        turn = resources.TARGETS[(i + 2 * (triton.__version__ == OLDEST)) % len(resources.TARGETS)]
        yield pytest.param(launch, turn, marks=[pytest.mark.slow] if i % 2 else [])
        if turn != 90:
            yield pytest.param(launch, 90, marks=pytest.mark.slow)


@pytest.mark.parametrize("launch, target", pairs())
def test_a_launch_is_clean_and_needs_what_the_table_says(kept, launch, target):
    """On NVIDIA: no race that a barrier prevents, small enough for a block. AMD's compiler may refuse."""
    rows = resources.rows_of(launch, target, clean=isinstance(target, int))
    if kept:
        assert rows == kept.get((launch, rows[0]["target"])), STALE
    elif isinstance(target, int):
        assert spills(rows) == {}


def test_the_table_lists_every_launch_once(kept):
    if not kept:
        pytest.skip(f"no table is kept for triton {triton.__version__}")
    labels = {f"sm_{t}" if isinstance(t, int) else t for t in resources.TARGETS}
    assert set(kept) == {(launch, label) for launch in resources.launches() for label in labels}, STALE


def spills(rows):
    """(launch, target) -> bytes that its kernels move because they are short of registers, where they are."""
    out = {}
    for row in rows:
        if moved := max(int(row["spill_stores"]), int(row["spill_loads"])):
            key = row["launch"], row["target"]
            out[key] = out.get(key, 0) + moved
    return out


def table(version):
    return resources.read(resources.TABLE.with_name(f"kernel_resources_triton-{version}.csv"))


def test_every_kernel_is_in_the_table():
    """A new kernel needs a launch in one of the compile tests."""
    assert set(resources.kernel_names()) <= {row["kernel"] for row in table(NEWEST)}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_nothing_spills_on_nvidia(version):
    on_nvidia = [row for row in table(version) if row["target"].startswith("sm_")]
    assert on_nvidia and {row["note"] for row in on_nvidia} == {""}
    assert spills(on_nvidia) == {}
