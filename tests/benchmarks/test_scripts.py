"""The scripts: the knobs of the sweep exist, the microbenchmark runs end to end, the GPU day resumes and reports."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import microbench
import pytest
import tile_sweep
import torch
from gpu_day import first_light as light
from gpu_day import goals
from micro.inputs import Inputs
from micro.providers import Provider
from micro.rows import Row
from micro.shapes import SHAPES, TINY, Setting

from helpers.micro_cases import make_ceilings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_day" / "first_light.sh"
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  -c*) exit 0 ;;
  *"first_light.py info"*) echo versions ;;
  *"first_light.py build"*) echo "nvcc is not there"; exit 77 ;;
  *"first_light.py replays"*) echo "1 replays differ"; exit $REPLAYS ;;
  *end_to_end.py*) sleep $SLEEP ;;
  *goals.py*) echo the goals ;;
esac
"""


@pytest.mark.parametrize("knob", tile_sweep.KNOBS, ids=lambda knob: f"{knob.module}.{knob.name}.{knob.key}")
def test_every_knob_turns(knob):
    """Once, in the interpreter; a setting that a launcher no longer reads is not a knob."""
    x = Inputs(Setting(TINY, torch.float32, 2, torch.device("cpu")))
    case = next(case for case in tile_sweep.CASES if case.name == knob.case)
    with knob.set(knob.values[0]):
        assert tile_sweep._times(case, x, 0.0, ()) == "right"


def test_a_knob_is_set_back():
    from vlmprune.triton_kernels import gather_tokens

    (knob,) = [k for k in tile_sweep.KNOBS if (k.module, k.name) == ("gather_tokens", "BLOCK_K")]
    before = gather_tokens.BLOCK_K
    with knob.set(8):
        assert gather_tokens.BLOCK_K == 8
    assert before == gather_tokens.BLOCK_K


def test_microbench_prints_and_writes(tmp_path, monkeypatch, capsys):
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
    env = os.environ | {"OUT": str(tmp_path / "out"), "STATE": str(tmp_path / "state"), "CALLS": str(calls)}

    def run(*arguments, **more):
        variables = env | {"PYTHON": str(python), "REPLAYS": "0", "SLEEP": "0"} | more
        calls.write_text("")
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=variables)
        return done, calls.read_text().splitlines()

    return run


def test_stages_run_in_order_and_only_once(first_light, tmp_path):
    done, calls = first_light()
    assert done.returncode == 0, done.stderr
    calls = [line for line in calls if "-m pytest" not in line and "tile_sweep" not in line]
    scripts = [line.removeprefix(f"{BENCHMARKS}/").split()[:2] for line in calls if not line.startswith("-c")]
    light = [["gpu_day/first_light.py", stage] for stage in ("info", "ceilings", "build", "check")]
    assert scripts[:6] == [*light, ["microbench.py", "--no-plots"], ["gpu_day/first_light.py", "replays"]]
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "summary.txt",
        "log.txt",
    }  # and rows.csv, once there are rows
    assert "versions\n" in (out / "log.txt").read_text()
    assert "1_build: cannot run here: nvcc is not there" in (out / "summary.txt").read_text()
    assert (tmp_path / "state" / "site" / "vlmprune" / "triton_kernels" / "__init__.py").exists()

    shutil.rmtree(out)  # what lasts is in the state
    done, calls = first_light()
    assert done.stdout.count("already there") == 15 and [c for c in calls if not c.startswith("-c")] == []


def test_a_failed_stage_runs_again_if_it_is_named(first_light, tmp_path):
    stages = tmp_path / "state" / "stages"
    first_light("3_replays", REPLAYS="1")
    assert (stages / "3_replays.failed").read_text() == "1 replays differ\n"
    assert "1 replays differ" in (tmp_path / "out" / "log.txt").read_text()
    assert "3_replays: already there" in first_light(LIMIT="6")[0].stdout
    first_light("3_replays")
    assert (stages / "3_replays.txt").exists() and not (stages / "3_replays.failed").exists()


def test_the_summary_ends_with_the_goals(first_light, tmp_path):
    rows = tmp_path / "state" / "rows.csv"
    rows.parent.mkdir()
    rows.write_text(",".join(Row.__dataclass_fields__) + "\n")
    _, calls = first_light("0_info")
    assert calls[-1] == f"{BENCHMARKS}/gpu_day/goals.py {rows}"
    assert (tmp_path / "out" / "summary.txt").read_text().endswith("the goals\n")
    assert (tmp_path / "out" / "rows.csv").exists()


def test_time_limit_cuts_a_stage_and_leaves_out_the_rest(first_light, tmp_path):
    done, _ = first_light("8_end_to_end", "9_sets", LIMIT="7", SLEEP="30")
    assert "8_end_to_end: cut off after" in done.stdout and "9_sets: no time left" in done.stdout
    assert (tmp_path / "state" / "stages" / "8_end_to_end.cut").exists()


def test_list_starts_nothing(first_light, tmp_path):
    done, calls = first_light("--list")
    assert calls == [] and not (tmp_path / "out").exists()
    assert [line.split("_")[0] for line in done.stdout.splitlines()] == list("001123344567899")


def test_unknown_option(first_light):
    done, _ = first_light("--fast")
    assert done.returncode == 2 and "unknown option --fast" in done.stderr


def goal_row(case, shape, provider, median, **changes):
    row = dict(case=case, shape=shape, provider=provider, median_us=str(median), dtype="bf16", rows="1")
    return row | dict(mode="graph", note="") | changes


def test_goals_are_met_missed_or_unmeasured():
    first, second = list(goals.FIGURES)[:2]
    rows = [
        goal_row("prune_tokens", first, "triton", 30),
        goal_row("prune_tokens", first, "plan", 20),  # the fastest of ours counts: 1.25 * 16
        goal_row("prune_tokens", first, "torch", 99.9),
        goal_row("prune_tokens", first, "plan", 1, mode="call"),
        goal_row("prune_tokens", first, "plan", 1, dtype="fp32"),
        goal_row("prune_tokens", first, "plan", 1, rows="64"),
        goal_row("prune_tokens", second, "triton", 32.6),
        goal_row("prune_tokens", second, "torch", 163),
        goal_row("prune_tokens", second, "eager", "", mode="", note="out of memory"),
        goal_row("received_attention", first, "triton", 5),
        goal_row("received_attention", first, "flash-colreduce", 5),
        goal_row("greedy_select maxmin", second, "triton", 5, rows="0"),
        goal_row("greedy_select maxmin", second, "published loop", 100, rows="0"),
    ]
    lines = list(goals.verdicts(goals.Results(rows)))
    assert len(lines) == 5 + 5 + 5 + 4 + 5 + 1
    verdict = {line.split("  ", 1)[1].strip().partition(":")[0]: line.split()[0] for line in lines}
    expected = {
        f"prune_tokens at most 20 us, {first}": "met",
        f"prune_tokens at most 32.5 us, {second}": "missed",
        f"prune_tokens 5 times as fast as torch, {first}": "missed",
        f"prune_tokens 5 times as fast as torch, {second}": "met",
        f"prune_tokens 20 times as fast as eager, {second}": "unmeasured",
        f"received_attention 1 times as fast as flash-colreduce, {first}": "missed",  # it is to be faster
        f"greedy_select maxmin 20 times as fast as published loop, {second}": "met",
    }
    assert {goal: verdict[goal] for goal in expected} == expected
    assert any(line.endswith(f"eager, {second}: out of memory") for line in lines)
    assert sum(word == "unmeasured" for word in verdict.values()) == len(lines) - 6


def test_goals_name_cases_shapes_and_providers_that_exist():
    shapes = [shape.name for shape in SHAPES]
    assert list(goals.FIGURES) == shapes
    for goal in goals.VERSUS:
        (case,) = [case for case in tile_sweep.CASES if case.name == goal.case]
        assert {goal.provider, "triton"} <= {provider.name for provider in case.providers()}
        assert set(goal.shapes) <= set(shapes)
    assert [s.name for s in SHAPES if s.length >= 2944] == list(goals.LONG)


def test_a_check_goes_on_after_a_failure(monkeypatch, capsys):
    def broken(x):
        raise RuntimeError("no such\nkernel")

    select = next(case for case in light.CASES if case.name == "select_topk")
    providers = (Provider("broken", broken), Provider("unsorted", lambda x: x.scores.topk(12).indices))
    case = dataclasses.replace(select, ours=providers)
    monkeypatch.setattr(light, "CASES", (case,))
    assert light.calls(tiny=True) == 1
    lines = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert "right" in lines and "failed: RuntimeError: no such kernel" in lines
    assert any(line.startswith("wrong result: index: expected ascending") for line in lines)
    monkeypatch.setattr(light, "CASES", (select,))
    assert light.calls(tiny=True) == 0
