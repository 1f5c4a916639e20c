"""The scripts: the knobs of the sweep exist, the microbenchmark runs end to end, the GPU day resumes and reports."""

import os
import subprocess
from pathlib import Path

import microbench
import pytest
import tile_sweep
import torch
from micro.inputs import Inputs
from micro.shapes import TINY, Setting

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_first_light.sh"
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  -c*) exit 0 ;;
  *"first_light.py info"*) echo versions ;;
  *"first_light.py build"*) echo "nvcc is not there"; exit 77 ;;
  *"first_light.py replays"*) echo "1 replays differ"; exit $REPLAYS ;;
  *end_to_end.py*) sleep 30 ;;
esac
"""


@pytest.mark.parametrize("knob", tile_sweep.KNOBS, ids=lambda knob: f"{knob.module}.{knob.name}.{knob.key}")
def test_every_knob_turns(knob):
    """Once, in the interpreter; a setting that a launcher no longer reads is not a knob."""
    x = Inputs(Setting(TINY, torch.float32, 2, torch.device("cpu")))
    case = next(case for case in tile_sweep.CASES if case.name == knob.case)
    value = next(value for value in knob.values if tile_sweep.fits(knob, value, x))
    with knob.set(value):
        assert tile_sweep._times(case, x, 0.0, ()) == "right"


def test_a_knob_is_set_back():
    from vlmprune.triton_kernels import gather_tokens

    (knob,) = [k for k in tile_sweep.KNOBS if (k.module, k.name) == ("gather_tokens", "BLOCK_K")]
    before = gather_tokens.BLOCK_K
    with knob.set(8):
        assert gather_tokens.BLOCK_K == 8
    assert before == gather_tokens.BLOCK_K


def test_microbench_prints_and_writes(tmp_path, make_ceilings, monkeypatch, capsys):
    path, options = tmp_path / "rows.csv", ["--shapes", "tiny", "--seconds", "0.001", "--no-plots"]
    monkeypatch.setattr("sys.argv", ["microbench", *options, "--cases", "select_topk", "--csv", str(path)])
    monkeypatch.setattr(microbench, "measure_ceilings", lambda *_: make_ceilings())
    assert microbench.main() == 0
    out = capsys.readouterr().out
    assert "select_topk" in out and f"4 rows in 0 s, appended to {path}" in out
    assert path.read_text().count("\n") == 5
    if not torch.cuda.is_available():
        assert "say nothing about the kernels" in out


@pytest.fixture
def first_light(tmp_path):
    """Return a function that runs the script with a Python that only notes its arguments."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    env = os.environ | {"OUT": str(tmp_path / "out"), "SITE": str(tmp_path / "site"), "CALLS": str(calls)}

    def run(*arguments, **more):
        variables = env | {"PYTHON": str(python), "REPLAYS": "0"} | more
        calls.write_text("")
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=variables)
        return done, calls.read_text().splitlines()

    return run


def test_stages_run_in_order_and_only_once(first_light, tmp_path):
    done, calls = first_light("0", "1_build", "3_select")
    assert done.returncode == 0, done.stderr
    scripts = [line.removeprefix(f"{BENCHMARKS}/").split()[:2] for line in calls if not line.startswith("-c")]
    expected = [["first_light.py", stage] for stage in ("info", "ceilings", "build")]
    assert scripts == [*expected, ["microbench.py", "--no-plots"]]
    out = tmp_path / "out"
    assert (out / "0_info.txt").read_text() == "versions\n"
    assert "1_build: cannot run here: nvcc is not there" in (out / "summary.txt").read_text()
    assert (tmp_path / "site" / "vlmprune" / "triton_kernels" / "__init__.py").exists()

    done, calls = first_light("0", "1_build", "3_select")
    assert done.stdout.count("already there") == 4 and calls == []


def test_a_failed_stage_runs_again(first_light, tmp_path):
    first_light("5_replays", REPLAYS="1")
    assert (tmp_path / "out" / "5_replays.failed").read_text() == "1 replays differ\n"
    first_light("5_replays")
    assert (tmp_path / "out" / "5_replays.txt").exists()
    assert not (tmp_path / "out" / "5_replays.failed").exists()


def test_time_limit_cuts_a_stage_and_leaves_out_the_rest(first_light, tmp_path):
    done, _ = first_light("8_end_to_end", "9_sets", LIMIT="4")
    assert "8_end_to_end: cut off after" in done.stdout and "9_sets: no time left" in done.stdout
    assert (tmp_path / "out" / "8_end_to_end.cut").exists()


def test_list_starts_nothing(first_light, tmp_path):
    done, calls = first_light("--list")
    assert calls == [] and not (tmp_path / "out").exists()
    assert [line.split("_")[0] for line in done.stdout.splitlines()] == list("00123445678" + "99")


def test_unknown_option(first_light):
    done, _ = first_light("--fast")
    assert done.returncode == 2 and "unknown option --fast" in done.stderr
