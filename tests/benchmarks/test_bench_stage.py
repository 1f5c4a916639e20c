"""The host time of a stage: in a small setting every line says what ran, and a fused pass starts as few kernels as it should.

Needs TRITON_INTERPRET=0, as kernels are compiled: where it measures, the script runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_stage
import pytest
import triton

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_stage.py"


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-P", str(SCRIPT), "--small", "--json"]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_policy_takes_both_roads(found):
    roads = [(line["policy"], line["road"]) for line in found["stages"]]
    policies = ("FastV", "Feather", "FasterVLM", "Uniform", "PyramidDrop")
    assert roads == [(policy, road) for policy in policies for road in ("ops", "fused")]
    for line in found["stages"]:
        separate = f"{line['policy']} chooses by itself"
        assert line["path"] == (separate if line["road"] == "ops" else "one pass (triton)")
        assert line["stage"] > 0 and (line["reading"] is None) == (line["policy"] not in ("FastV", "Feather"))
    assert set(found["decode"]) == {"unpruned", "pruned"} and min(found["decode"].values()) > 0


def test_a_fused_pass_starts_few_kernels(found):
    launches = {(line["policy"], line["road"]): line["launches"] for line in found["stages"]}
    assert 2 <= launches["FastV", "fused"] <= 3  # nobody gives it a log-sum-exp
    assert 2 <= launches["Feather", "fused"] <= 4
    assert all(launches[policy, "fused"] < launches[policy, "ops"] for policy, _ in launches)


def test_the_table_has_a_line_for_each(found):
    lines = bench_stage.table(found).splitlines()
    assert len(lines) == 3 + 10 + 1
    assert lines[4].split()[:2] == ["FastV", "fused"] and lines[4].endswith("3  one pass (triton)")
    assert lines[-1].startswith("decode step: ")


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_stage"])
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit, match="expected TRITON_INTERPRET=0"):
        bench_stage.main()
