"""Answers the sample questions of examples/glyphworld with several policies and counts the exact answers."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune.policies import policy_from

FOLDER = Path(__file__).parent / "glyphworld"
POLICIES = [
    "fastv:layer=2,keep=40",
    "feather:layers=2/5,keep=0.3,stride=3",
    "uniform:layer=2,keep=40",
    "uniform:layer=2,keep=40,order=raster",
    "random:layer=2,keep=40",
]


def main() -> None:
    """Print one line per policy: exact answers by kind of question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policies", nargs="*", default=POLICIES, help="NAME[:field=value,...]")
    texts = parser.parse_args().policies
    processor = AutoProcessor.from_pretrained(FOLDER / "checkpoint")
    model = AutoModelForImageTextToText.from_pretrained(FOLDER / "checkpoint", dtype=torch.float32).eval()
    questions = [
        (scene["image"], qa["family"], qa["prompt"], qa["answer"])
        for scene in json.loads((FOLDER / "images" / "questions.json").read_text())
        for qa in scene["qa"]
    ]
    for text in [None, *texts]:
        policy = None if text is None else policy_from(text)
        right: dict[str, list[bool]] = {}
        for image, family, prompt, answer in track(questions, description=text or "unpruned", transient=True):
            right.setdefault(family, []).append(ask(model, processor, policy, image, prompt) == answer)
        total = sum(map(sum, right.values()))
        kinds = ", ".join(f"{family} {sum(hits)}/{len(hits)}" for family, hits in right.items())
        print(f"{text or 'unpruned'}: {total} of {len(questions)} exact ({kinds})")


def ask(model, processor, policy, image: str, prompt: str) -> str:
    """The model's answer to one question, pruned by ``policy`` unless it is None."""
    inputs = processor(text=prompt, images=Image.open(FOLDER / "images" / image), return_tensors="pt")
    with vlmprune.prune(model, policy) if policy is not None else nullcontext():
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


if __name__ == "__main__":
    main()
