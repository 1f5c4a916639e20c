"""Trains a GlanceScorer on glyphworld: which visual tokens show what a question asks for. The model itself stays as it is.

    python -P examples/glance/train.py --out DIR              # some minutes; --smoke: seconds, for trying it out
    vlmprune run --model examples/glyphworld/checkpoint-576 --image PICTURE --prompt "read the word ." \\
        --policy learned:scorer=DIR/trained,layer=0,keep=40

DIR/start is the scorer before the first step, DIR/trained the one after the last, DIR/log.json what was found on the way.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoProcessor, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from lessons import FIRST_SEED, Lesson, found, lessons, teach

from vlmprune.policies import GlanceScorer

GLYPHWORLD = Path(__file__).parents[1] / "glyphworld"
_HELD_OUT = range(60001, 60033)
_LOG_EVERY = 50  # steps


def main() -> None:
    """Train, save, say what the scorer finds."""
    args = _arguments()
    torch.manual_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.bfloat16).eval()
    scorer = GlanceScorer(model.config.text_config.hidden_size, args.layer)
    args.out.mkdir(parents=True, exist_ok=True)
    scorer.save_pretrained(args.out / "start")
    held_out = list(lessons(model, processor, scorer, _HELD_OUT[: args.held_out], args.scenes))
    start, log = time.perf_counter(), [{"step": 0, "found": _shares(scorer, held_out)}]
    seeds = range(FIRST_SEED, FIRST_SEED + args.steps * args.scenes)
    taught = lessons(model, processor, scorer, seeds, args.scenes)
    losses = teach(scorer, taught, args.steps, args.rate)
    for step, loss in enumerate(track(losses, "training", total=args.steps, transient=True), 1):
        if step % _LOG_EVERY == 0 or step == args.steps:
            seconds = round(time.perf_counter() - start, 1)
            log.append(
                {"step": step, "seconds": seconds, "loss": round(loss, 4), "found": _shares(scorer, held_out)}
            )
            print(json.dumps(log[-1]), flush=True)
    scorer.eval().save_pretrained(args.out / "trained")
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")


def _shares(scorer: GlanceScorer, held_out: list[Lesson]) -> dict[str, float]:
    """How much of what is asked for is among so many of the best."""
    return {f"{share:.0%}": round(found(scorer, held_out, share), 4) for share in (0.05, 0.1, 0.2)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the run")
    add(
        "--checkpoint",
        type=Path,
        default=GLYPHWORLD / "checkpoint-576",
        help="the model, which stays as it is",
    )
    add("--layer", type=int, default=0, help="the stage")
    add("--steps", type=int, default=300)
    add("--scenes", type=int, default=4, help="a step, each with some seven questions")
    add("--held-out", type=int, default=32, help="scenes by which progress is told, at most 32")
    add("--rate", type=float, default=2e-3)
    add("--seed", type=int, default=0, help="of the first weights")
    add("--smoke", action="store_true", help="a few steps on the small checkpoint")
    args = parser.parse_args()
    if args.smoke:
        args.checkpoint, args.steps, args.scenes, args.held_out = GLYPHWORLD / "checkpoint", 12, 1, 2
    return args


if __name__ == "__main__":
    main()
