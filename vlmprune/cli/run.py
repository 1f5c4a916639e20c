"""The ``run`` command: checks, loads, runs every policy, shows the results."""

from __future__ import annotations

import json
from typing import Any

import torch
from PIL import Image

from vlmprune.checkpoints import build_text
from vlmprune.cli.generate import Outcome, Request, build_inputs, generate, median
from vlmprune.cli.picture import check_target, draw, seen_images
from vlmprune.cli.progress import TokenCounter, token_bar, waiting
from vlmprune.cli.show import as_json, show
from vlmprune.errors import check
from vlmprune.images import open_rgb
from vlmprune.models import patch_grid
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.recipe import policy_from


def execute(request: Request) -> None:
    """Run the command. Raises one of ``vlmprune.errors`` for bad input, OSError where a file cannot be written."""
    policies = [policy_from(text) for text in request.policies]
    images = [open_rgb(path, "--image") for path in request.images]
    if request.save is not None:
        check_target(request.save)
    inputs = prepare(request, policies, images)
    outcomes = run_all(request, policies, inputs)
    if request.save is not None:
        checkpoint = request.checkpoint
        seen = seen_images(inputs["pixel_values"].float().cpu(), checkpoint.processor.image_processor)
        draw(seen, patch_grid(checkpoint.config), outcomes).save(request.save)
    if request.as_json:
        print(json.dumps(as_json(request, outcomes)))  # noqa: T201
    else:
        show(request, outcomes)


def prepare(request: Request, policies: list[PruningPolicy], images: list[Image.Image]) -> Any:
    """Check the rest from the configuration and the processor, then load the weights; inputs on the model's device."""
    checkpoint = request.checkpoint
    checkpoint.check_depth(policies)
    processor = checkpoint.processor
    inputs = build_inputs(processor, build_text(processor, request.prompt, len(images)), images)
    if request.save is not None:
        shape = tuple(inputs["pixel_values"].shape)
        check(len(shape) == 4 and shape[0] == len(images), "--save", "one tile per image", f"pixels {shape}")
    with waiting(f"loading {checkpoint.source}"):
        return inputs.to(checkpoint.device, dtype=checkpoint.model.dtype)


def run_all(request: Request, policies: list[PruningPolicy], inputs: Any) -> list[Outcome]:
    """Every column of the table. An untimed run goes first, which compiles, warms up and shows progress."""
    columns: list[tuple[str | None, PruningPolicy | None]] = list(
        zip(request.policies, policies, strict=True)
    )
    if request.compare or not columns:
        columns.insert(0, (None, None))
    outcomes, checkpoint, limit = [], request.checkpoint, request.max_new_tokens
    for label, policy in columns:
        with token_bar() as bar, torch.inference_mode():
            counter = TokenCounter(bar, f"warm-up: {label or 'unpruned'}", limit)
            generate(checkpoint, inputs, label, policy, limit, counter)
        with waiting(f"timed runs: {label or 'unpruned'}"), torch.inference_mode():
            runs = [generate(checkpoint, inputs, label, policy, limit) for _ in range(request.repeat)]
        outcomes.append(median(runs))
    return outcomes
