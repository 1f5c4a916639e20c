"""Writes a question set: pictures and one JSON object a line with what to ask about them and the true answers.

    python examples/glyphworld/make_questions.py --seeds 70001:70101 --out FOLDER

FOLDER/questions.jsonl: {"id", "image", "family", "prompt", "answer", "box"}. ``prompt`` is the bare question, for a checkpoint's
chat template to frame. ``box`` is what it is about, in pixels, left out where that is not one thing. An answer of the family
"box" is "x1 y1 x2 y2" in steps of 4 pixels (6 at --size 192). --clutter 1 puts the scenes in front of photographs, with
decoys between the objects.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from world.questions import ask_all
from world.scenes import SIDES, make_scene

STREAM = 99  # of a scene's random numbers: another than the one training draws its questions from


def main() -> None:
    """Write the folder; questions.jsonl appears last, so a folder that has it is complete."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=seed_range, required=True, help="FIRST:END, END excluded, below 1000000"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder, made if it is not there")
    parser.add_argument(
        "--size", type=int, choices=SIDES, default=112, help="pixels: 196 or 576 visual tokens"
    )
    parser.add_argument("--boxes", type=int, default=1, help="questions for a box in every scene")
    parser.add_argument("--clutter", type=clutter_share, default=0.0, help="of the scenes, 0 to 1")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in track(args.seeds, description="drawing", transient=True):
        asked = list(questions_of(seed, args.size, args.boxes, args.clutter))
        lines += [json.dumps(entry) + "\n" for _, entry in asked]
        for image, entry in asked[:1]:
            image.save(args.out / entry["image"])
    part = args.out / "questions.jsonl.part"
    part.write_text("".join(lines))
    os.replace(part, args.out / "questions.jsonl")
    print(f"{len(lines)} questions about {len(args.seeds)} scenes in {args.out}")


def seed_range(text: str) -> Sequence[int]:
    """``FIRST:END`` as a range of seeds.

    Raises:
        argparse.ArgumentTypeError: not two numbers, or nothing between them.
    """
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"expected FIRST:END with FIRST < END, got {text!r}")
    return range(int(first), int(end))


def clutter_share(text: str) -> float:
    """How much clutter, as a number.

    Raises:
        argparse.ArgumentTypeError: not a number within 0 and 1.
    """
    try:
        clutter = float(text)
    except ValueError:
        clutter = math.nan
    if not 0 <= clutter <= 1:
        raise argparse.ArgumentTypeError(f"expected a number within 0 and 1, got {text!r}")
    return clutter


def questions_of(
    seed: int, side: int, boxes: int = 1, clutter: float = 0.0
) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """The picture and the entries of one scene: every family once where it can be asked, ``boxes`` times "box"."""
    scene = make_scene(seed, side, clutter)
    image = Image.fromarray(scene.image)
    for number, question in enumerate(ask_all(scene, np.random.default_rng((seed, STREAM)), boxes)):
        entry: dict[str, Any] = {
            "id": f"{seed}-{number}-{question.family}",
            "image": f"scene_{seed}.png",
            "family": question.family,
            "prompt": " ".join(question.words),
            "answer": " ".join(question.answer),
        }
        if question.box is not None:
            entry["box"] = list(question.box)
        yield image, entry


if __name__ == "__main__":
    main()
