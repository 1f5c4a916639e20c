"""Scores a checkpoint without pruning on scenes it was never trained on: greedy answers, family by family.

    python examples/glyphworld/accuracy.py --checkpoint DIR --seeds 70001:70301

For pruning methods there is `vlmprune eval`; this is the figure to expect from it when nothing is pruned.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from transformers import AutoProcessor, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from make_questions import clutter_share, questions_of, seed_range
from training.wording import full_prompt

_NEW_TOKENS = 16  # a box in single digits, the spaces between them, and the end
_HIT = 0.5  # intersection over union from which a box counts as found


def main() -> None:
    """Print one line per family, and everything as JSON with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument(
        "--seeds", type=seed_range, default=range(70001, 70301), help="FIRST:END, END excluded"
    )
    parser.add_argument("--boxes", type=int, default=1, help="questions for a box in every scene")
    parser.add_argument("--clutter", type=clutter_share, default=0.0, help="of the scenes, 0 to 1")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    side = model.config.vision_config.image_size
    asked = [pair for seed in args.seeds for pair in questions_of(seed, side, args.boxes, args.clutter)]
    start = time.perf_counter()
    answers = list(
        track(answer(model, processor, asked, args.batch), "asking", total=len(asked), transient=True)
    )
    seconds = time.perf_counter() - start
    result = score([entry for _, entry in asked], answers)
    if args.json:
        print(json.dumps({"questions": len(asked), "seconds": seconds, "families": result}))
        return
    for family, row in result.items():
        boxes = f", IoU >= {_HIT} {row['found']:.1%}" if "found" in row else ""
        print(f"{family:6} {row['exact']:6.1%} of {row['questions']} exact{boxes}")
    right = sum(row["questions"] * row.get("found", row["exact"]) for row in result.values()) / len(asked)
    print(f"{right:.1%} right, boxes at IoU >= {_HIT}")
    print(f"{len(asked)} questions, {len(asked) / seconds:.1f} a second")


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: Any,
    asked: list[tuple[Image.Image, dict[str, Any]]],
    batch: int = 64,
) -> Iterator[str]:
    """The greedy answer to each question, in order."""
    for start in range(0, len(asked), batch):
        images, entries = zip(*asked[start : start + batch], strict=True)
        prompts = [full_prompt(processor, entry["prompt"]) for entry in entries]
        inputs = processor(
            text=prompts, images=list(images), padding=True, return_tensors="pt", add_special_tokens=False
        ).to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        yield from (text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True))


def score(entries: list[dict[str, Any]], answers: list[str]) -> dict[str, dict[str, float]]:
    """By family: number of questions, share answered exactly, and for boxes the share found."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for entry, text in zip(entries, answers, strict=True):
        rows.setdefault(entry["family"], []).append((entry["answer"], text))
    result = {}
    for family, pairs in rows.items():
        row = {"questions": len(pairs), "exact": sum(a == b for a, b in pairs) / len(pairs)}
        if family == "box":
            row["found"] = sum(overlap(a, b) >= _HIT for a, b in pairs) / len(pairs)
        result[family] = row
    return result


def overlap(first: str, second: str) -> float:
    """Intersection over union of two boxes as they are answered; 0 for what is not a box."""
    boxes = [[int(word) for word in text.split() if word.isdigit()] for text in (first, second)]
    if any(len(box) != 4 or box[0] >= box[2] or box[1] >= box[3] for box in boxes):
        return 0.0
    (l1, t1, r1, b1), (l2, t2, r2, b2) = boxes
    shared = max(0, min(r1, r2) - max(l1, l2)) * max(0, min(b1, b2) - max(t1, t2))
    return shared / ((r1 - l1) * (b1 - t1) + (r2 - l2) * (b2 - t2) - shared)


if __name__ == "__main__":
    main()
