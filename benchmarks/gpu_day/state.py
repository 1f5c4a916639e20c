"""What was found so far, in a folder that can be taken to another machine in one file."""

from __future__ import annotations

import tarfile
from pathlib import Path

CUT = "cut"
UNFINISHED = (CUT, "overran")  # the others: done, failed, refused
TAR = "state.tar"
BENCH = "bench"  # folders of results of `vlmprune bench`
LEARNED = "learned"  # folders of trained models and what they answered
KEPT = ("summary.txt", "rows.csv", "stages", "journals", BENCH, LEARNED)


class State:
    """Outcomes and outputs of stages (``stages/NAME.OUTCOME``), rows, journals, and the summary.

    An outcome is done, failed, refused, overran (the stage its own limit), or CUT: the call ended before the stage did. A stage
    under way has ``NAME.part``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows, self.summary = folder / "rows.csv", folder / "summary.txt"
        self.stages, self.journals = folder / "stages", folder / "journals"
        self.begun = self.stages.exists()
        self.bench = folder / BENCH
        for path in (self.stages, self.journals, self.bench):
            path.mkdir(parents=True, exist_ok=True)

    def outcome(self, stage: str) -> str | None:
        """How a stage ended, None if it never did."""
        return next((p.suffix[1:] for p in self.stages.glob(f"{stage}.*") if p.suffix != ".part"), None)

    def forget(self, stage: str) -> None:
        """As if a stage had never run."""
        for path in self.stages.glob(f"{stage}.*"):
            path.unlink()

    def start(self, stage: str) -> Path:
        """Forget how a stage ended; where its output goes now."""
        self.forget(stage)
        return self.stages / f"{stage}.part"

    def end(self, stage: str, outcome: str) -> None:
        """Keep what was written."""
        (self.stages / f"{stage}.part").rename(self.stages / f"{stage}.{outcome}")

    def forget_journal(self, name: str) -> None:
        """Begin anew."""
        for path in self._journals(name):
            path.unlink()

    def reopen_journal(self, name: str) -> None:
        """Let what was under way when the call ended be begun again: it was not to blame."""
        for path in self._journals(name):
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(lines[:-1]))

    def _journals(self, name: str) -> list[Path]:
        return [path for path in self.journals.iterdir() if name and path.name.partition(".")[0] == name]

    def note(self, line: str) -> None:
        """A line of the summary."""
        print(line, flush=True)
        with self.summary.open("a") as file:
            file.write(f"{line}\n")

    def log(self) -> str:
        """The outputs of all stages, one after the other."""
        paths = sorted(self.stages.iterdir(), key=lambda path: path.stat().st_mtime)
        return "\n".join(f"==> {path.name} <==\n{path.read_text(errors='replace')}" for path in paths)

    def save(self, folder: Path) -> None:
        """Write everything into one file; never half of it, whenever the machine goes."""
        fresh = folder / f"{TAR}.new"
        with tarfile.open(fresh, "w:gz") as tar:
            for name in KEPT:
                if (self.folder / name).exists():
                    tar.add(self.folder / name, name)
        fresh.replace(folder / TAR)

    def load(self, tar: Path) -> None:
        """Take over what another machine had saved."""
        with tarfile.open(tar) as file:
            file.extractall(self.folder, filter="data")
