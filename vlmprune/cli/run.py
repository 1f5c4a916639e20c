"""The ``run`` command: checks, loads, runs every policy, shows the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmprune import __version__
from vlmprune.checkpoints import Checkpoint, build_text, make_inputs
from vlmprune.cli.console import waiting
from vlmprune.cli.outcome import median, run_once
from vlmprune.cli.picture import check_target, draw, seen_images
from vlmprune.cli.show import show
from vlmprune.errors import check
from vlmprune.images import open_rgb
from vlmprune.models import patch_grid
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.recipe import policy_from


def execute(
    checkpoint: Checkpoint,
    images: Sequence[Path],
    prompt: str,
    typed: Sequence[str],
    max_new_tokens: int,
    repeat: int,
    compare: bool,
    save: Path | None,
    as_json: bool,
) -> None:
    """Run the command. Raises one of ``vlmprune.errors`` for bad input, OSError where a file cannot be written."""
    columns: list[tuple[str | None, PruningPolicy | None]] = [(text, policy_from(text)) for text in typed]
    inputs = prepare(checkpoint, images, prompt, [policy for _, policy in columns if policy], save)
    outcomes = []
    for label, policy in [(None, None)] * (compare or not columns) + columns:
        # An untimed run goes first, which compiles and warms up.
        with waiting(f"warm-up: {label or 'unpruned'}"):
            run_once(checkpoint, inputs, label, policy, max_new_tokens)
        with waiting(f"timed runs: {label or 'unpruned'}"):
            runs = [run_once(checkpoint, inputs, label, policy, max_new_tokens) for _ in range(repeat)]
        outcomes.append(median(runs))
    if save is not None:
        seen = seen_images(inputs["pixel_values"].float().cpu(), checkpoint.processor.image_processor)
        draw(seen, patch_grid(checkpoint.config), outcomes).save(save)
    settings = {
        "version": __version__,
        "model": checkpoint.source,
        "images": [str(path) for path in images],
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "device": checkpoint.device,
        "dtype": checkpoint.dtype,
        "precision": checkpoint.precision,
        "attention": checkpoint.attention,
        "warm_up_runs": 1,
        "timed_runs": repeat,
        "picture": None if save is None else str(save),
    }
    if as_json:
        told = [vars(outcome) | {"report": outcome.report.as_dict()} for outcome in outcomes]
        print(json.dumps(settings | {"runs": told}))  # noqa: T201
    else:
        show(settings, outcomes)


def prepare(
    checkpoint: Checkpoint,
    images: Sequence[Path],
    prompt: str,
    policies: Sequence[PruningPolicy],
    save: Path | None,
) -> Any:
    """Check all that can fail without the weights, then load them; inputs on the model's device."""
    pictures = [open_rgb(path, "--image") for path in images]
    if save is not None:
        check_target(save)
    checkpoint.check_depth(policies)
    text = build_text(checkpoint.processor, prompt, len(images))
    inputs = make_inputs(checkpoint.processor, [text], [pictures], "--image")
    if save is not None:
        shape = tuple(inputs["pixel_values"].shape)
        check(len(shape) == 4 and shape[0] == len(images), "--save", "one tile per image", f"pixels {shape}")
    with waiting(f"loading {checkpoint.source}"):
        return inputs.to(checkpoint.device, dtype=checkpoint.model.dtype)
