"""Trains a small LLaVA-OneVision on clips, from a checkpoint that looks at pictures or from one of its own.

    python examples/glyphworld/train_video.py --minutes 60 --out DIR

Stopped in the middle, the same command with --resume continues. OUT/log.jsonl has the losses, OUT/checkpoint the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from train import STATE, export, follow
from training.loop import Plan
from training.video_model import ClipProcessor, make_tokenizer, watching
from training.videos import ClipTrainer
from world.videos import SIDE

from vlmprune.precision import slow_on_cpu


def main() -> None:
    """Train, save, say where the checkpoint is."""
    args = _arguments()
    state = args.out / STATE
    if state.exists() != args.resume:
        wanted = "a run in --out" if args.resume else "a new folder as --out, or --resume"
        raise SystemExit(f"--resume: expected {wanted}, got {args.out}")
    torch.manual_seed(0)
    device = torch.device(args.device)
    mixed = device.type != "cpu" or not slow_on_cpu(torch.bfloat16)
    model = _model(args.init)
    plan = Plan(SIDE, args.minutes, args.steps, args.batch, args.text, args.rate, 0.0, args.first_seed)
    trainer = ClipTrainer(model, ClipProcessor(make_tokenizer()), plan, device, mixed)
    if args.resume:
        trainer.load(state)
    if args.compile:
        trainer.compile()
    args.out.mkdir(parents=True, exist_ok=True)
    follow(trainer, args.out)
    target = args.out / "checkpoint"
    export(trainer, target)
    print(f"{trainer.step} steps, checkpoint in {target}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=60.0, help="time budget; the schedule follows it")
    parser.add_argument("--steps", type=int, help="budget in steps instead of minutes")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--init",
        type=Path,
        default=Path(__file__).parent / "checkpoint",
        help="checkpoint to start from: of pictures of 112 pixels, or of clips",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="clips a step")
    parser.add_argument("--text", type=int, default=192, help="text positions a clip")
    parser.add_argument("--rate", type=float, default=0.008, help="learning rate")
    parser.add_argument("--first-seed", type=int, default=Plan.first_seed, help="first clip trained on")
    parser.add_argument("--compile", action="store_true", help="compile the model (minutes, then faster)")
    return parser.parse_args()


def _model(source: Path) -> LlavaOnevisionForConditionalGeneration:
    """Explicit attention, everywhere: the trainer reads where some heads look."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if AutoConfig.from_pretrained(source).model_type == "llava_onevision":
        return LlavaOnevisionForConditionalGeneration.from_pretrained(source, **options)
    return watching(LlavaForConditionalGeneration.from_pretrained(source, **options), "eager")


if __name__ == "__main__":
    main()
