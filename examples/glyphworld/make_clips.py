"""Writes a set of questions about clips: a folder of frames a clip, and one JSON object a line with what to ask of it.

    python examples/glyphworld/make_clips.py --seeds 70001:70101 --out FOLDER

FOLDER/clip_*/ has the 8 frames of a clip, 0.png to 7.png: no codec is needed, and frames that are alike stay apart, which
an animation may not keep. FOLDER/questions.jsonl: {"id", "video", "family", "prompt", "answer", "seen"}, ``answer`` the true
one. ``prompt`` is the bare question, for a checkpoint's chat template to frame. ``seen``, left out where the question is not
about one thing: [[frame, left, top, right, bottom], ...] in pixels of a frame, wherever it shows the answer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from make_questions import STREAM, seed_range
from world.video_questions import ask_all
from world.videos import FRAMES, make_clip

Frames = NDArray[np.uint8]


def main() -> None:
    """Write the folder; questions.jsonl appears last, so a folder that has it is complete."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=seed_range, required=True, help="FIRST:END, END excluded, below 1000000"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder, made if it is not there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in track(args.seeds, description="drawing", transient=True):
        asked = list(clip_questions_of(seed))
        lines += [json.dumps(entry) + "\n" for _, entry in asked]
        for frames, entry in asked[:1]:
            write_clip(args.out / entry["video"], frames)
    part = args.out / "questions.jsonl.part"
    part.write_text("".join(lines))
    os.replace(part, args.out / "questions.jsonl")
    print(f"{len(lines)} questions about {len(args.seeds)} clips in {args.out}")


def clip_questions_of(seed: int) -> Iterator[tuple[Frames, dict[str, Any]]]:
    """The frames ``[8, 112, 112, 3]`` and the entries of one clip: every family once where it can be asked."""
    clip = make_clip(seed)
    for number, question in enumerate(ask_all(clip, np.random.default_rng((seed, STREAM)))):
        entry: dict[str, Any] = {
            "id": f"{seed}-{number}-{question.family}",
            "video": f"clip_{seed}",
            "family": question.family,
            "prompt": " ".join(question.words),
            "answer": " ".join(question.answer),
        }
        if question.seen:
            entry["seen"] = [[time, *box] for time, box in question.seen]
        yield clip.frames, entry


def write_clip(path: Path, frames: Frames) -> None:
    """A folder of the frames, made if it is not there."""
    path.mkdir(exist_ok=True)
    for time, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{time}.png")


def read_clip(path: Path) -> Frames:
    """The frames ``[8, 112, 112, 3]`` that ``write_clip`` wrote."""
    return np.stack([np.asarray(Image.open(path / f"{time}.png")) for time in range(FRAMES)])


if __name__ == "__main__":
    main()
