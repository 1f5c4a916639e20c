"""Scores a checkpoint on clips that it was never trained on: greedy answers, family by family; pruned with --policy.

    python examples/glyphworld/clip_accuracy.py --checkpoint DIR --seeds 70001:70201
    python examples/glyphworld/clip_accuracy.py --checkpoint DIR --policy uniform:layer=0,keep=0.25

It needs no video processor: frames are read from pixels. Without --policy it says what to expect when nothing is pruned.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoConfig, LlavaOnevisionForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from accuracy import score
from make_clips import Frames, clip_questions_of
from make_questions import seed_range
from training.video_model import ClipProcessor
from training.wording import full_prompt

import vlmprune
from vlmprune.models import check_stages
from vlmprune.policies import PruningPolicy

_NEW_TOKENS = 6  # four words of a place, and the end


def main() -> None:
    """Print one line per family, and everything as JSON with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint-video")
    parser.add_argument(
        "--seeds", type=seed_range, default=range(70001, 70201), help="FIRST:END, END excluded"
    )
    parser.add_argument(
        "--policy", action="append", help="as for vlmprune, again for another; unpruned first"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.checkpoint)
    try:
        policies = [None, *map(vlmprune.policy_from, args.policy or ())]
        for policy in policies[1:]:
            check_stages(policy, config)
    except vlmprune.InputError as error:
        parser.error(str(error))
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        args.checkpoint, dtype=getattr(torch, args.dtype)
    )
    model, processor = model.to(args.device).eval(), ClipProcessor.from_pretrained(args.checkpoint)
    asked = [pair for seed in args.seeds for pair in clip_questions_of(seed)]
    for policy, text in zip(policies, ["unpruned", *(args.policy or ())], strict=True):
        start = time.perf_counter()
        given = answer_clips(model, processor, asked, args.batch, policy)
        answers = list(track(given, text, total=len(asked), transient=True))
        _report(text, score([entry for _, entry in asked], answers), time.perf_counter() - start, args.json)


@torch.inference_mode()
def answer_clips(
    model: LlavaOnevisionForConditionalGeneration,
    processor: ClipProcessor,
    asked: list[tuple[Frames, dict[str, Any]]],
    batch: int = 32,
    policy: PruningPolicy | None = None,
) -> Iterator[str]:
    """The greedy answer to each question, in order."""
    for start in range(0, len(asked), batch):
        clips, entries = zip(*asked[start : start + batch], strict=True)
        prompts = [full_prompt(processor, entry["prompt"], "video") for entry in entries]
        inputs = processor(prompts, clips).to(model.device, model.dtype)
        with nullcontext() if policy is None else vlmprune.prune(model, policy):
            out = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        yield from (text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True))


def _report(policy: str, families: dict[str, dict[str, float]], seconds: float, as_json: bool) -> None:
    asked = sum(row["questions"] for row in families.values())
    right = sum(row["questions"] * row["exact"] for row in families.values()) / asked
    if as_json:
        told = {"policy": policy, "questions": asked, "right": right, "seconds": seconds}
        print(json.dumps(told | {"families": families}))
        return
    print(policy)
    for family, row in families.items():
        print(f"  {family:6} {row['exact']:6.1%} of {row['questions']}")
    print(f"  {right:.1%} of {asked} right, {asked / seconds:.1f} questions a second")


if __name__ == "__main__":
    main()
