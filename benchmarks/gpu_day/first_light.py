"""Everything worth knowing on a GPU, in seven calls of at most ten minutes, the most important first.

    python benchmarks/gpu_day/first_light.py 1 to 7|STAGE ... [--dry-run] [--list]

$OUT gets few files, brought up to date after every stage: summary.txt has one line a stage and the goals (met, missed,
unmeasured), rows.csv the times, log.txt what every stage printed, and state.tar everything, for the next call. A stage that is
done, failed, overran its limit or could not run is not started again unless it is named; one that the call cut off is.
No network, no installation: the package is imported from a plain copy in $STATE/site, and what `make gpu-day` made
beforehand is taken from $KIT.

OUT      where results go (default: benchmarks/results/first_light)
STATE    what lasts from call to call on one machine (default: build/first_light)
KIT      what was made beforehand (default: build/gpu_day); a state.tar in it is where a new machine goes on
LIMIT    seconds for everything (default: 430 if it is call 1, else 540)
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ only: a checkout must stay off the path

from gpu_day import rehearsal
from gpu_day.kit import ROOT, commit, lay_out_package
from gpu_day.stages import BENCHMARKS, PREPARES, Stage, stages
from gpu_day.state import CUT, TAR, UNFINISHED, State
from micro.restart import run_to_the_end

REFUSED = 77  # exit code of a stage that cannot run here
SLOWER = 5  # times that a stage may take in a dry run, on a CPU
SPARE = 5  # seconds in which a stage is worth starting, or ends when it is told to
GOALS = BENCHMARKS / "gpu_day" / "goals.py"
SPEED_GOALS = BENCHMARKS / "gpu_day" / "speed_goals.py"


def arguments() -> argparse.Namespace:
    """Command line."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("what", nargs="*", metavar="1 to 7|STAGE")
    parser.add_argument(
        "--dry-run", action="store_true", help="every stage small, on a CPU if there is no GPU"
    )
    parser.add_argument("--list", action="store_true", help="name the stages")
    chosen = parser.parse_args()
    every = stages(Path(), Path())
    names = [*dict.fromkeys(str(stage.call) for stage in every if stage.call != PREPARES)]
    names += [stage.name for stage in every]
    wrong = [name for name in chosen.what if name not in names]
    if wrong or not (chosen.what or chosen.list):
        parser.error(f"expected {', '.join(names)}, got {wrong[0] if wrong else 'nothing'}")
    return chosen


class Day:
    """One call: where things lie, and how much time is left."""

    def __init__(self, dry: bool, limit: float) -> None:
        def folder(name: str, default: Path) -> Path:
            return Path(os.environ.get(name, default)).resolve()

        self.dry, self.end = dry, time.monotonic() + limit
        self.out = folder("OUT", BENCHMARKS / "results" / "first_light")
        self.kit = folder("KIT", ROOT / "build" / "gpu_day")
        self.state = State(folder("STATE", ROOT / "build" / "first_light"))
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.state.begun and (self.kit / TAR).exists():
            self.state.load(self.kit / TAR)
            for stage in stages(self.state.folder, self.kit):
                if stage.call == PREPARES:
                    self.state.forget(stage.name)
            self.state.note(f"going on from {self.kit / TAR}")
        self.env = os.environ | self._variables(lay_out_package(self.state.folder, self.kit))
        if dry:
            rehearsal.prepare(self.env)

    def _variables(self, site: Path) -> dict[str, str]:
        path = [str(site), str(self.kit / "site"), os.environ.get("PYTHONPATH", "")]
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.state.folder / "triton"),
            "COMMIT": commit(self.kit),
        }
        return variables | ({"TRITON_INTERPRET": "1"} if self.dry and not _has_gpu() else {})

    def run(self, stage: Stage, named: bool) -> None:
        """Run a stage unless it is finished, and publish what is known then."""
        before = self.state.outcome(stage.name)
        if before not in (None, CUT) and not named:
            return self.state.note(f"{stage.name}: {before} before")
        left, limit = self.end - time.monotonic(), stage.seconds * (SLOWER if self.dry else 1)
        if left < SPARE:
            return self.state.note(f"{stage.name}: no time left")
        if named and before not in UNFINISHED:
            self.state.forget_journal(stage.journal)
        start = time.monotonic()
        outcome, why = self._outcome(stage, min(limit, left), cut=left < limit)
        if outcome in UNFINISHED:
            self.state.reopen_journal(stage.journal)
        self.state.end(stage.name, outcome)
        self.state.note(f"{stage.name}: {outcome} after {time.monotonic() - start:.0f} s{why}")
        return self.publish()

    def _outcome(self, stage: Stage, seconds: float, cut: bool) -> tuple[str, str]:
        """(How the stage ended, what else there is to say about it)."""
        command = stage.command(sys.executable, self.state.journals, self.dry)
        with self.state.start(stage.name).open("w") as log:
            if command is None:
                log.write(f"{stage.tool[0]} is not installed\n")
                return "refused", f": {stage.tool[0]} is not installed"
            end, journal = time.monotonic() + seconds, self.state.journals / (stage.journal or "none")
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            try:
                code, restarts = run_to_the_end(lambda: self._start(command, log, end), journal)
            except subprocess.TimeoutExpired:
                return (CUT, ": the call ends") if cut else ("overran", "")
        if restarts:
            return "failed", f": the device was lost {restarts} times, exit code {code} at last"
        if code == REFUSED:
            last = (self.state.stages / f"{stage.name}.part").read_text().splitlines()[-1]
            return "refused", f": {last}"
        return ("done", "") if code == 0 else ("failed", f": exit code {code}")

    def _start(self, command: list[str], log: TextIO, end: float) -> int:
        """Exit code of a command; at ``end`` it is interrupted, so that pytest says what failed so far, and then killed."""
        if self.dry and command[0] == sys.executable:
            return rehearsal.start(command[1:], log)
        how = dict(stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=self.env, start_new_session=True)
        process = subprocess.Popen(command, **how)  # type: ignore[call-overload]
        try:
            return process.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(SPARE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise

    def publish(self) -> None:
        """Bring $OUT up to date: a call that is killed has left what it knew."""
        summary = self.state.summary.read_text()
        if self.state.rows.exists():
            (self.out / "rows.csv").write_bytes(self.state.rows.read_bytes())
            summary += _printed(GOALS, self.state.rows)
        if any(self.state.bench.iterdir()):
            summary += _printed(SPEED_GOALS, self.state.bench)
        (self.out / "summary.txt").write_text(summary)
        (self.out / "log.txt").write_text(self.state.log())
        self.state.save(self.out)


def _printed(script: Path, argument: Path) -> str:
    """What a script says, errors too, behind an empty line."""
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return f"\n{subprocess.run([sys.executable, str(script), str(argument)], **how).stdout}"  # type: ignore[call-overload]


def _has_gpu() -> bool:
    import torch  # which takes its time, and a real run has a GPU

    return torch.cuda.is_available()


def main() -> int:
    """Run what was asked for; 0 whatever it finds."""
    chosen = arguments()
    every = stages(Path(), Path())
    if chosen.list:
        for stage in every:
            call = "each" if stage.call == PREPARES else stage.call
            print(f"{call} {stage.name} (at most {stage.seconds} s)")
        return 0
    limit = float(os.environ.get("LIMIT", 430 if chosen.what == ["1"] else 540))
    day = Day(chosen.dry_run, limit * (SLOWER if chosen.dry_run else 1))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    day.state.note(f"== {now} commit {day.env['COMMIT']}: {' '.join(chosen.what)}")
    for stage in stages(day.state.folder, day.kit):
        if stage.name in chosen.what or str(stage.call) in chosen.what or stage.call == PREPARES:
            day.run(stage, stage.name in chosen.what)
    day.publish()
    print(f"results in {day.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
