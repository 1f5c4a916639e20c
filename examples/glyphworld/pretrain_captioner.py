"""Pretrains ACCM's captioner on notes about scenes, as the paper's starts from one that was pretrained on COCO's captions.

    python -P examples/glyphworld/pretrain_captioner.py --kind general --minutes 10 --out DIR

Features are what the checkpoint's projector gives of the places that pruning drops, at 90, 94 and 97 %. DIR/compensator is a
compensator, as `vlmprune accm train --init` and `vlmprune.ACCM` take it, whose selector has learned nothing yet; DIR/log.jsonl
has the losses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from training.captions import KINDS, Sheet, caption_loss, make_sheets, score_captions
from training.losses import see
from world.clutter import FIRST_SEED

from vlmprune.compensation import Captioner, Describer, Discarded, Selector

_LOG_EVERY = 50  # steps
_WARM_UP = 50
_CONSTANT = 0.3  # share of the budget before the learning rate falls to zero
_LONGEST = {"asked": 24, "general": 24, "scene": 67}  # tokens of a caption
_FIRST = FIRST_SEED + 500_000  # other scenes than the checkpoint was trained on in its last runs
_HELD_OUT = range(71001, 71065)


def main() -> None:
    """Pretrain, save, say how true the words are."""
    args = _arguments()
    torch.manual_seed(args.seed)
    processor = AutoProcessor.from_pretrained(args.model)
    vlm = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    captioner = (
        _new(args, vlm, processor) if args.init is None else Describer.from_pretrained(args.init).captioner
    )
    captioner.config.max_new_tokens = _LONGEST[args.kind]
    args.out.mkdir(parents=True, exist_ok=True)
    _train(captioner.train(), vlm, args)
    Describer(captioner.eval(), _selector(processor, vlm)).save_pretrained(args.out / "compensator")
    result = evaluate(captioner, vlm, args.kind)
    (args.out / "held_out.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=Path(__file__).parent / "checkpoint",
        help="checkpoint whose tokens are read",
    )
    add("--out", type=Path, required=True, help="folder of the run")
    add("--kind", choices=KINDS, default="general", help="; ".join(f"{k}: {v}" for k, v in KINDS.items()))
    add("--init", type=Path, help="compensator to go on from instead of random weights")
    add("--minutes", type=float, default=10.0, help="time budget; the schedule follows it")
    add("--width", type=int, default=128)
    add("--layers", type=int, default=3, help="of the language model; the mapper has the paper's 4")
    add("--batch", type=int, default=32, help="pictures a step")
    add("--pairs", type=int, default=4, help="questions and captions a picture")
    add("--rate", type=float, default=0.01)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def _new(args: argparse.Namespace, vlm: LlavaForConditionalGeneration, processor: AutoProcessor) -> Captioner:
    """A small GPT-2 with the checkpoint's words behind the paper's mapper."""
    tokenizer = processor.tokenizer
    config = GPT2Config(
        vocab_size=vlm.config.text_config.vocab_size,
        n_positions=128,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    end = None if args.kind == "scene" else "."
    settings = {"end": end, "max_new_tokens": _LONGEST[args.kind]}
    return Captioner.make(vlm.config.text_config.hidden_size, GPT2LMHeadModel(config), tokenizer, **settings)


def _selector(processor: AutoProcessor, vlm: LlavaForConditionalGeneration) -> Selector:
    """A new one, its text encoder too: a small BERT with the checkpoint's words, to be trained with the rest."""
    words = vlm.config.text_config.vocab_size
    config = BertConfig(
        vocab_size=words,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return Selector.make(BertModel(config), processor.tokenizer, train_text_encoder=True)


def _train(captioner: Captioner, vlm: LlavaForConditionalGeneration, args: argparse.Namespace) -> None:
    optimizers = _optimizers(captioner)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    start, step, losses = time.monotonic(), 0, []
    with Progress(*columns) as bar, (args.out / "log.jsonl").open("w") as log:
        task = bar.add_task("starting", total=1.0)
        while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
            first = _FIRST + (args.seed * 1_000_000 + step) * args.batch
            sheets = _sheets(range(first, first + args.batch), vlm, args.kind, args.pairs)
            features = look(vlm, sheets)
            with torch.autocast("cpu", torch.bfloat16):
                loss = caption_loss(captioner, features, sheets)
            loss.backward()
            nn.utils.clip_grad_norm_(captioner.parameters(), 1.0)
            rate = args.rate * min(1.0, (step + 1) / _WARM_UP, (1 - progress) / (1 - _CONSTANT))
            for optimizer, share in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * share
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            losses.append(float(loss.detach()))
            bar.update(task, completed=progress, description=f"step {step}: {losses[-1]:.3f}")
            if step % _LOG_EVERY == 0:
                line = {"step": step, "seconds": round(time.monotonic() - start, 1)}
                log.write(json.dumps(line | {"loss": float(np.mean(losses[-_LOG_EVERY:]))}) + "\n")
                log.flush()


def _optimizers(captioner: Captioner) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices inside the layers, Adam for everything else; each with its share of the rate."""
    inside = [p for n, p in captioner.named_parameters() if p.ndim == 2 and (".h." in n or ".blocks." in n)]
    known = {*map(id, inside)}
    others = [p for p in captioner.parameters() if id(p) not in known]
    muon = torch.optim.Muon(inside, lr=0.0, weight_decay=0.01, momentum=0.95)
    return [(muon, 1.0), (torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0), 0.2)]


def _sheets(seeds: range, vlm: LlavaForConditionalGeneration, kind: str, pairs: int) -> list[Sheet]:
    side = vlm.config.vision_config.image_size
    return make_sheets(seeds, side, (side // vlm.config.vision_config.patch_size) ** 2, kind, pairs)


@torch.no_grad()
def look(vlm: LlavaForConditionalGeneration, sheets: list[Sheet]) -> torch.Tensor:
    """The visual tokens of the pictures, ``[I, N, D]``."""
    images = torch.from_numpy(np.stack([sheet.scene.image for sheet in sheets]))
    return see(vlm, images.to(vlm.dtype))[1].float()


@torch.no_grad()
def evaluate(captioner: Captioner, vlm: LlavaForConditionalGeneration, kind: str) -> dict[str, float]:
    """Shares of what it writes greedily about scenes it has not seen, by what is true of it."""
    sheets = _sheets(_HELD_OUT, vlm, kind, 4)
    images, pairs = [], []
    for sheet, features in zip(sheets, look(vlm, sheets), strict=True):
        for question, _ in sheet.pairs:
            images.append(Discarded(features, sheet.dropped, " ".join(question.words)))
            pairs.append((sheet.scene, question))
    said = [texts[0] for texts in captioner.write(images, 1)]
    return score_captions(pairs, said)


if __name__ == "__main__":
    main()
