"""The ``run`` command: checks, loads, runs every policy, shows the results."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune import __version__
from vlmprune.checkpoints import Checkpoint, build_text, generate, make_inputs
from vlmprune.cli.console import progress_bar
from vlmprune.cli.pictures import Pictures
from vlmprune.cli.show import show, told_stages, told_times
from vlmprune.errors import check
from vlmprune.models import check_videos, explain, patch_grid
from vlmprune.policies.base import PruningPolicy
from vlmprune.progress import Progress
from vlmprune.view.outcome import Outcome, median, run_once
from vlmprune.view.picture import check_target, draw, seen_images
from vlmprune.view.strip import clip_of, draw_strips

log = logging.getLogger(__name__)


def execute(
    checkpoint: Checkpoint,
    shown: Pictures,
    prompt: str,
    policies: Sequence[tuple[str, PruningPolicy]],
    max_new_tokens: int,
    repeat: int,
    compare: bool,
    save: Path | None,
    as_json: bool,
) -> None:
    """Run the command. Raises one of ``vlmprune.errors`` for bad input, OSError where a file cannot be written."""
    columns: list[tuple[str | None, PruningPolicy | None]] = [*policies]
    if compare or not columns:
        columns.insert(0, (None, None))
    with progress_bar(f"loading {checkpoint.source}") as tell:
        inputs = prepare(checkpoint, shown, prompt, [policy for _, policy in policies], save)
        outcomes = _ask(checkpoint, inputs, columns, max_new_tokens, repeat, tell)
    if save is not None:
        _picture(checkpoint, inputs, shown, outcomes).save(save)
    settings = {
        "version": __version__,
        "model": checkpoint.source,
        "images": [str(path) for path in shown.paths],
        "frames": len(shown.images) if shown.clip else None,
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
    shown: Pictures,
    prompt: str,
    policies: Sequence[PruningPolicy],
    save: Path | None,
) -> Any:
    """Check all that can fail without the weights, then load them; inputs on the model's device."""
    if save is not None:
        check_target(save)
    checkpoint.check_depth(policies)
    processor = checkpoint.processor
    if shown.clip:
        check_videos(checkpoint.config, "--video")
        text = build_text(processor, prompt, 1, "video")
        inputs = make_inputs(processor, [text], [[]], "--video", clips=[shown.images])
    else:
        text = build_text(processor, prompt, len(shown.images))
        inputs = make_inputs(processor, [text], [shown.images], "--image")
    if save is not None and not shown.clip:
        shape, images = tuple(inputs["pixel_values"].shape), len(shown.images)
        check(len(shape) == 4 and shape[0] == images, "--save", "one tile per image", f"pixels {shape}")
    return inputs.to(checkpoint.device, dtype=checkpoint.model.dtype)


def _picture(checkpoint: Checkpoint, inputs: Any, shown: Pictures, outcomes: list[Outcome]) -> Image.Image:
    """What the model saw and what was kept of it."""
    if shown.clip:
        return draw_strips(shown.images, clip_of(checkpoint.config, inputs), outcomes)
    seen = seen_images(inputs["pixel_values"].float().cpu(), checkpoint.processor.image_processor)
    return draw(seen, patch_grid(checkpoint.config), outcomes)


def _ask(
    checkpoint: Checkpoint,
    inputs: Any,
    columns: Sequence[tuple[str | None, PruningPolicy | None]],
    limit: int,
    repeat: int,
    tell: Progress,
) -> list[Outcome]:
    """The median of every column's timed runs. An untimed one goes first, which compiles and warms up."""
    if checkpoint.attention == "vlmprune":
        usable = [name for name, why in explain(checkpoint.device) if why is None]
        log.info("attention kernel: %s", usable[0] if usable else "none")
    outcomes, total = [], len(columns) * (1 + repeat)
    for i, (label, policy) in enumerate(columns):
        name, done = label or "unpruned", i * (1 + repeat)
        where = f"{i + 1} of {len(columns)}"
        tokens = _Tokens(tell, where, name, done, total)
        run, _ = generate(checkpoint.model, inputs, policy, max_new_tokens=limit, streamer=tokens)
        log.info("%s: %s", name, told_stages(run.report()))
        runs = []
        for n in range(1, repeat + 1):
            tell(f"{where}, timed run {n} of {repeat}: {name}", done + n, total)
            runs.append(run_once(checkpoint, inputs, label, policy, limit))
            log.info("%s, timed run %d: %s", name, n, told_times(runs[-1].report))
        outcomes.append(median(runs))
    return outcomes


@dataclass
class _Tokens:
    """Tells how many new tokens a warm-up has, as one of transformers' streamers: these wait for each, so nothing is timed."""

    tell: Progress
    where: str
    name: str
    done: int
    total: int
    count: int = 0

    def put(self, tokens: Any) -> None:
        """Called by ``generate`` with the prompt, then with every new token."""
        self.tell(f"{self.where}, warm-up, {self.count} tokens: {self.name}", self.done, self.total)
        self.count += 1

    def end(self) -> None:
        """Called by ``generate`` when it is done."""
