"""The GPU day: its calls go on where they were, on this machine and on another; every stage's command line is one its program takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_day import first_light, kit, pack, probes, replays
from gpu_day.stages import PREPARES, Stage, stages
from gpu_day.state import TAR
from micro.cases import CASES
from micro.providers import Provider
from micro.rows import Row
from micro.shapes import TINY, Setting
from micro.sweep import title

from helpers.micro_cases import make_inputs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXIT = "import os, sys; print({!r}); sys.exit(int(os.environ['{}']))"
JOURNALED = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["BENCHMARKS"])
from micro.restart import Journal

for case in "abc":
    if Journal(Path(sys.argv[-1])).begin(case):
        print("case", case, flush=True)
        if case == os.environ["BREAKS"]:
            os._exit(75)
        if case == os.environ["HANGS"]:
            time.sleep(60)
"""


class Days:
    """Calls of the script in this process, with stages that are one line of Python each."""

    def __init__(self, folder, monkeypatch):
        self.out, self.state, self.kit = (folder / name for name in ("out", "state", "kit"))
        self._patch, self._journaled = monkeypatch, folder / "journaled.py"
        self._journaled.write_text(JOURNALED)
        self.variables(
            OUT=self.out, STATE=self.state, KIT=self.kit, REPLAYS=0, REFUSES=77, BREAKS="", HANGS=""
        )
        self.variables(BENCHMARKS=BENCHMARKS)
        monkeypatch.setattr(first_light, "stages", self._stages)
        monkeypatch.setattr(first_light, "SPARE", 0.3)

    def variables(self, **values):
        for name, value in values.items():
            self._patch.setenv(name, str(value))

    def _stages(self, state, kit):
        return [
            Stage(1, "info", 20, ("-c", "import os; print('path', os.environ['PYTHONPATH'])")),
            Stage(PREPARES, "build", 20, ("-c", EXIT.format("nvcc is not there", "REFUSES"))),
            Stage(1, "replays", 20, ("-c", EXIT.format("1 replays differ", "REPLAYS"))),
            Stage(1, "tool", 20, ("-c", "print('never')"), tool=("no-such-tool",)),
            Stage(2, "check", 20, (str(self._journaled),), journal="check"),
            Stage(2, "slow", 0.5, ("-c", "import time; time.sleep(60)")),
        ]

    def call(self, *arguments):
        """Names and outcomes of the stages, but for the one that is part of every call, as their outputs are filed."""
        self._patch.setattr("sys.argv", ["first_light.py", *arguments])
        assert first_light.main() == 0
        found = dict(path.name.split(".") for path in (self.state / "stages").iterdir())
        assert found.pop("build", "refused") == "refused"
        return found

    def printed(self, name):
        (path,) = (self.state / "stages").glob(f"{name}.*")
        return path.read_text().splitlines()[1:]  # behind the command


@pytest.fixture
def days(tmp_path, monkeypatch):
    return Days(tmp_path, monkeypatch)


def test_stages_run_once(days, capsys):
    found = days.call("1")
    assert found == {"info": "done", "replays": "done", "tool": "refused"}
    out = capsys.readouterr().out
    assert (
        "build: refused after 0 s: nvcc is not there" in out
        and "tool: refused after 0 s: no-such-tool is" in out
    )
    assert {path.name for path in days.out.iterdir()} == {"summary.txt", "log.txt", TAR}
    assert "1 replays differ" in (days.out / "log.txt").read_text()
    days.call("1")
    out = capsys.readouterr().out
    assert out.count(" before\n") == 4 and " after " not in out


def test_the_callers_path_is_kept(days):
    days.variables(PYTHONPATH="/some/wheels")
    days.call("info")
    assert days.printed("info") == [f"path {days.state}/site:{days.kit}/site:/some/wheels"]
    assert (days.state / "site" / "vlmprune" / "triton_kernels" / "__init__.py").exists()


def test_a_failed_stage_runs_again_if_it_is_named(days, capsys):
    days.variables(REPLAYS=1)
    assert days.call("1")["replays"] == "failed"
    assert "replays: failed after 0 s: exit code 1" in capsys.readouterr().out
    days.variables(REPLAYS=0)
    assert days.call("1")["replays"] == "failed"
    assert days.call("replays")["replays"] == "done"


def test_another_machine_goes_on(days, capsys):
    days.call("1")
    days.kit.mkdir()
    shutil.copy(days.out / TAR, days.kit / TAR)
    shutil.rmtree(days.state)
    shutil.rmtree(days.out)
    capsys.readouterr()
    days.call("1")
    out = capsys.readouterr().out
    assert f"going on from {days.kit / TAR}" in out and out.count(" before\n") == 3
    assert "build: refused after" in out  # what it prepares is not there
    assert "1 replays differ" in (days.out / "log.txt").read_text()


def test_a_stage_that_overran_is_told_from_one_that_was_cut(days, monkeypatch):
    assert days.call("slow")["slow"] == "overran"
    days.variables(LIMIT=2, HANGS="b")
    assert days.call("2") == {"slow": "overran", "check": "cut"}
    days.variables(LIMIT=30, HANGS="")
    assert days.call("2") == {"slow": "overran", "check": "done"}
    assert days.printed("check") == ["case b", "case c"]  # what was under way was begun again


def test_nothing_starts_without_time(days, capsys):
    days.variables(LIMIT=0.1)
    assert days.call("1") == {} and capsys.readouterr().out.count("no time left") == 4


def test_a_lost_device_takes_one_case_with_it(days, capsys):
    days.variables(BREAKS="b")
    assert days.call("check")["check"] == "failed"
    assert "the device was lost 1 times, exit code 0 at last" in capsys.readouterr().out
    assert days.printed("check") == ["case a", "case b", "case c"]
    days.variables(BREAKS="")
    assert days.call("check")["check"] == "done" and days.printed("check")[0] == "case a"  # all of it


def test_the_summary_ends_with_the_goals(days):
    days.state.mkdir()
    (days.state / "rows.csv").write_text(",".join(Row.__dataclass_fields__) + "\n")
    days.call("info")
    summary = (days.out / "summary.txt").read_text()
    assert (
        "info: done" in summary and "unmeasured  prune_tokens at most 20 us, llava-1.5-7b: no row" in summary
    )
    assert (days.out / "rows.csv").exists()


@pytest.mark.parametrize("arguments, error", [((), "got nothing"), (("8",), "got 8")])
def test_bad_arguments(monkeypatch, capsys, arguments, error):
    monkeypatch.setattr("sys.argv", ["first_light.py", *arguments])
    with pytest.raises(SystemExit):
        first_light.main()
    assert error in capsys.readouterr().err


def test_list_starts_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("STATE", str(tmp_path / "state"))
    monkeypatch.setattr("sys.argv", ["first_light.py", "--list"])
    assert first_light.main() == 0
    assert (
        capsys.readouterr().out.startswith("each build (at most 120 s)\n1 info")
        and not (tmp_path / "state").exists()
    )


def test_the_calls_fit_their_time():
    every = stages(Path("state"), Path("kit"))
    assert len({stage.name for stage in every}) == len(every)
    seconds = {
        call: sum(s.seconds for s in every if s.call == call) for call in {s.call for s in every} - {PREPARES}
    }
    assert seconds[1] <= 430 and max(seconds.values()) <= 540  # a library that is there takes no time


def test_a_library_is_used_if_it_is_of_these_sources(tmp_path):
    folder, site = tmp_path / "kit", tmp_path / "state" / "site" / "vlmprune"
    folder.mkdir()
    (folder / kit.LIBRARY).write_text("library")
    (folder / kit.DIGEST).write_text("other sources")
    kit.lay_out_package(tmp_path / "state", folder)
    assert not (site / kit.LIBRARY).exists()
    (folder / kit.DIGEST).write_text(kit.sources_digest())
    kit.lay_out_package(tmp_path / "state", folder)
    assert kit.has_library(site)
    shutil.rmtree(folder)
    kit.lay_out_package(tmp_path / "state", folder)  # once laid out, or built there, it stays
    assert kit.has_library(site)


def test_without_history_the_commit_is_the_one_that_was_noted(tmp_path, monkeypatch):
    kit.stamp(tmp_path)
    monkeypatch.setenv("PATH", "")  # no git
    noted = json.loads((tmp_path / kit.STAMP).read_text())["commit"]
    assert kit.commit(tmp_path) == noted and len(noted.removesuffix("-dirty")) >= 7
    monkeypatch.setattr(kit, "MEASURED", ("csrc",))
    assert kit.commit(tmp_path) == f"{noted}-changed"
    assert kit.commit(tmp_path / "elsewhere") == "unknown"


def test_what_travels_is_what_git_does_not_ignore():
    there = {*pack.checkout()}
    assert Path(kit.__file__) in there and not [
        path for path in there if "build" in path.relative_to(kit.ROOT).parts[:1]
    ]
    assert pack.size_of([Path(__file__)]) == Path(__file__).stat().st_size / 2**20


SELECT = next(case for case in CASES if case.name == "select_topk")
SETTING = make_inputs(rows=1).setting


def test_replays_of_a_kernel_give_the_bits_of_a_first_call():
    from vlmprune import ops

    def run(x):
        with ops.use_backend("triton"):
            return SELECT.run(x)

    assert replays.differences(Provider("triton", run), SETTING, 4) == 0


def test_a_stale_workspace_is_seen():
    """A first call of it is right, and so is every later one on the same input."""
    workspaces = {}

    def run(x):
        largest = workspaces.setdefault(id(x), x.scores.clone())
        largest.copy_(largest.maximum(x.scores))
        return largest.clone()

    assert replays.differences(Provider("stale", run), SETTING, 6) == 6


def test_two_seeds_are_two_prompts():
    one, other = make_inputs(rows=1), type(make_inputs())(Setting(TINY, SETTING.dtype, 1, SETTING.device), 1)
    assert not one.scores.equal(other.scores) and one.rows.equal(other.rows)
    assert title(SELECT, one, SELECT.own()[-1]) == "select_topk, tiny, torch.float32, R=1, reference"


def test_a_check_of_one_shape_is_a_line_that_its_program_takes(monkeypatch):
    line = ["check", "--dtype", "fp32", "--shape", "qwen2.5-vl-7b-4k", "--journal", "j"]
    monkeypatch.setattr("sys.argv", ["probes.py", *line])
    assert probes.arguments().shape == "qwen2.5-vl-7b-4k"


@pytest.mark.slow
def test_every_stage_runs_small(tmp_path):
    """The real command lines, on what there is here; a library that does not load is no end."""
    folder = tmp_path / "kit"
    folder.mkdir()
    (folder / kit.LIBRARY).write_text("no library")
    (folder / kit.DIGEST).write_text(kit.sources_digest())
    env = os.environ | {"OUT": str(tmp_path / "out"), "STATE": str(tmp_path / "state"), "KIT": str(folder)}
    command = [
        sys.executable,
        "-P",
        BENCHMARKS / "gpu_day" / "first_light.py",
        *"1234567",
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = dict(path.name.split(".") for path in (tmp_path / "state" / "stages").iterdir())
    assert set(found) == {stage.name for stage in stages(Path("state"), Path("kit"))}
    refused = {"train_smollm2", "ask_smollm2"}  # its package is not there
    assert {name: "refused" if name in refused else "done" for name in found} == found, done.stdout
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "does not load, so it is built here" in log and "no kernels were compiled beforehand" in log
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "backends:" in summary and "unmeasured  selection under 0.1 ms" in summary
    found = {path.parent.name for path in (tmp_path / "state" / "bench").glob("*/results.json")}
    assert found == {
        "quick",
        "llava-1.5-7b",
        "llava-next-7b",
        "qwen2.5-vl-7b-16k",
        "qwen3-vl-4b",
        "llava-1.5-13b",
    }
