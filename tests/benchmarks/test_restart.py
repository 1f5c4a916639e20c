"""An illegal access, simulated: it ends its process, the next one goes on behind it, and nothing else is blamed for it."""

import dataclasses
import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import microbench
import pytest
import torch
from gpu_day import correct
from micro import restart
from micro.cases import CASES
from micro.restart import LOST, Journal, device_lost, run_to_the_end
from micro.rows import read
from micro.shapes import TINY

from helpers.micro_cases import make_ceilings

ROOT = Path(__file__).parents[2]
ILLEGAL = "CUDA error: an illegal memory access was encountered"
TESTS = """
import pytest
broken = []

@pytest.mark.parametrize("i", range(6))
def test_it(i):
    if i == 1:
        broken.append(i)
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def sticky(cases):
    """The cases, of which the second breaks the device for as long as the process lives."""
    broken = []

    def around(run, breaks):
        def call(x):
            if breaks:
                broken.append(True)
            if broken:
                raise (torch.AcceleratorError if breaks else RuntimeError)(ILLEGAL)
            return run(x)

        return call

    return tuple(
        dataclasses.replace(case, run=around(case.run, i == 1), torch=None, others=(), ours=())
        for i, case in enumerate(cases)
    )


@pytest.fixture
def three_cases(monkeypatch):
    names = ("received_attention", "row_lse", "select_topk")
    cases = sticky([next(case for case in CASES if case.name == name) for name in names])
    monkeypatch.setattr("micro.sweep.CASES", cases)


def in_forks(main, journal):
    """(exit code, restarts) of ``main``, run in forks of this process."""

    def run():
        process = get_context("fork").Process(target=lambda: sys.exit(main()))
        process.start()
        process.join(60)
        return process.exitcode

    return run_to_the_end(run, journal)


def test_what_loses_the_device():
    from triton.runtime.errors import OutOfResources

    assert device_lost(torch.AcceleratorError("an illegal instruction"))
    assert device_lost(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    assert not device_lost(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
    assert not device_lost(OutOfResources(300_000, 232_448, "shared memory"))
    assert not device_lost(ValueError("rows: expected int64"))


def test_a_microbenchmark_goes_on_behind_it(three_cases, monkeypatch, tmp_path):
    rows, journal = tmp_path / "rows.csv", tmp_path / "journal"
    options = [
        "--shapes",
        "tiny",
        "--rows",
        "1",
        "--seconds",
        "0.001",
        "--no-plots",
        "--providers",
        "reference",
    ]
    line = ["microbench", *options, "--csv", str(rows), "--journal", str(journal)]
    monkeypatch.setattr("sys.argv", line)
    monkeypatch.setattr(microbench, "measure_ceilings", lambda *_: make_ceilings())
    assert in_forks(microbench.main, journal) == (0, 1)
    found = [(row["case"], bool(row["median_us"]), row["note"]) for row in read(rows)]
    assert found == [
        ("received_attention", True, ""),
        ("row_lse", False, f"failed: AcceleratorError: {ILLEGAL}"),
        ("select_topk", True, ""),
    ]


def test_a_check_goes_on_behind_it(three_cases, tmp_path):
    journal, said = tmp_path / "journal", tmp_path / "said"

    def main():
        with said.open("a") as file:
            sys.stdout = file
            return correct.check(TINY, torch.device("cpu"), torch.float32, Journal(journal), ["reference"])

    assert in_forks(main, journal) == (0, 2)  # the second case, at one row and at 64
    notes = [line.partition(": ")[2].strip() for line in said.read_text().splitlines() if "R=" in line]
    assert notes.count(f"failed: AcceleratorError: {ILLEGAL}") == 2
    assert sum("failed" in note for note in notes) == 2 and notes.count("right") == 3


def test_a_process_that_begins_nothing_new_is_not_started_again(tmp_path):
    codes = iter([LOST, LOST, 0])
    assert run_to_the_end(lambda: next(codes), tmp_path / "journal") == (LOST, 0)


def test_a_crash_counts_a_failure_does_not(tmp_path):
    journal = tmp_path / "journal"

    def run(code):
        Journal(journal).begin(f"{next(numbers)}")
        return code

    numbers = iter(range(9))
    codes = iter([-11, LOST, 1, 0])
    assert run_to_the_end(lambda: run(next(codes)), journal) == (1, 2)
    assert "0" in Journal(journal) and not Journal(journal).begin("1") and Journal(None).begin("1")


@pytest.mark.parametrize("workers, ends", [(1, "1 failed, 5 passed"), (0, "1 passed")])
def test_a_test_that_loses_the_device_ends_its_process(tmp_path, workers, ends):
    (tmp_path / "conftest.py").write_text("from helpers.lost_device import pytest_runtest_makereport\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    env["PYTHONPATH"] = f"{ROOT / 'tests' / '_lib'}:{ROOT / 'benchmarks'}"
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-n",
        str(workers),
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert ends in done.stdout, done.stdout
    assert f"test_it[1]: the device is lost: {ILLEGAL}" in done.stdout + done.stderr
    assert done.returncode == (1 if workers else LOST)


def test_the_exit_code_is_no_other():
    assert restart.LOST not in (0, 1, 2, 3, 4, 5, 77)
