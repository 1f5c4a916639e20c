"""The ``run`` command: checks, loads, runs every policy, shows the results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmprune.cli.generate import Outcome, build_inputs, build_text, generate, median
from vlmprune.cli.load import (
    Loaded,
    check_attention,
    check_depth,
    load,
    load_processor,
    pick_device,
    quiet,
    read_config,
)
from vlmprune.cli.picture import check_target, draw, seen_images
from vlmprune.cli.progress import TokenCounter, token_bar, waiting
from vlmprune.cli.show import as_json, show
from vlmprune.errors import check
from vlmprune.images import open_rgb
from vlmprune.models import patch_grid
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.recipe import policy_from


@dataclass(frozen=True)
class Request:
    """What was typed; see the options of ``vlmprune run``."""

    model: str
    images: tuple[Path, ...]
    prompt: str
    policies: tuple[str, ...]
    max_new_tokens: int
    repeat: int
    device: str
    dtype: str
    attention: str
    compare: bool
    save: Path | None
    as_json: bool


def execute(request: Request) -> None:
    """Run the command. Raises one of ``vlmprune.errors`` for bad input, OSError where a file cannot be written."""
    quiet()
    policies = [policy_from(text) for text in request.policies]
    images = [open_rgb(path, "--image") for path in request.images]
    if request.save is not None:
        check_target(request.save)
    loaded, inputs = prepare(request, policies, images)
    outcomes = run_all(request, policies, loaded, inputs)
    if request.save is not None:
        grid = patch_grid(loaded.model.config)
        seen = seen_images(inputs["pixel_values"].float().cpu(), loaded.processor.image_processor)
        draw(seen, grid, outcomes).save(request.save)
    if request.as_json:
        print(json.dumps(as_json(request, loaded, outcomes)))  # noqa: T201
    else:
        show(request, loaded, outcomes)


def prepare(request: Request, policies: list[PruningPolicy], images: list[Image.Image]) -> tuple[Loaded, Any]:
    """Check the rest from the configuration and the processor, then load the weights."""
    device = pick_device(request.device)
    check_attention(request.attention, device)
    config = read_config(request.model)
    check_depth(policies, config)
    processor = load_processor(request.model)
    inputs = build_inputs(processor, build_text(processor, request.prompt, len(images)), images)
    if request.save is not None:
        shape = tuple(inputs["pixel_values"].shape)
        check(len(shape) == 4 and shape[0] == len(images), "--save", "one tile per image", f"pixels {shape}")
    with waiting(f"loading {request.model}"):
        loaded = load(request.model, config, processor, device, request.dtype, request.attention)
    return loaded, inputs.to(device, dtype=loaded.model.dtype)


def run_all(request: Request, policies: list[PruningPolicy], loaded: Loaded, inputs: Any) -> list[Outcome]:
    """Every column of the table. An untimed run goes first, which compiles, warms up and shows progress."""
    columns: list[tuple[str | None, PruningPolicy | None]] = list(
        zip(request.policies, policies, strict=True)
    )
    if request.compare or not columns:
        columns.insert(0, (None, None))
    outcomes = []
    for label, policy in columns:
        with token_bar() as bar, torch.inference_mode():
            counter = TokenCounter(bar, f"warm-up: {label or 'unpruned'}", request.max_new_tokens)
            generate(loaded, inputs, label, policy, request.max_new_tokens, counter)
        with waiting(f"timed runs: {label or 'unpruned'}"), torch.inference_mode():
            limits = [request.max_new_tokens] * request.repeat
            outcomes.append(median([generate(loaded, inputs, label, policy, limit) for limit in limits]))
    return outcomes
