"""One question to one model: the prompt becomes inputs, and one greedy generation becomes an Outcome."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError, first_line
from vlmprune.models import Report, meter, prune
from vlmprune.policies.base import PruningPolicy


@dataclass(frozen=True)
class Request:
    """What was typed; see the options of ``vlmprune run``."""

    checkpoint: Checkpoint
    images: tuple[Path, ...]
    prompt: str
    policies: tuple[str, ...]
    max_new_tokens: int
    repeat: int
    compare: bool
    save: Path | None
    as_json: bool


@dataclass(frozen=True)
class Outcome:
    """What one run said, kept and cost.

    Attributes:
        policy: the policy as it was typed, or None for the unpruned run.
        answer: the generated text.
        kept: per stage, the numbers (prompt order) of the visual tokens that survived it.
        report: tokens, FLOPs and seconds.
        settings: the policy as data.
    """

    policy: str | None
    answer: str
    kept: tuple[tuple[int, ...], ...]
    report: Report
    settings: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """A heading for tables and pictures."""
        return self.policy or "unpruned"


def build_inputs(processor: Any, text: str, images: list[Image.Image]) -> Any:
    """Token ids and pixel values, on the CPU. Raises InputError for what the processor does not take."""
    bos = processor.tokenizer.bos_token
    twice = bos is not None and text.startswith(bos)  # a template that writes <bos> must not get a second one
    try:
        return processor(text=text, images=images, return_tensors="pt", add_special_tokens=not twice)
    except ValueError as error:
        raise InputError(
            f"--image: expected what the checkpoint's processor takes, got: {first_line(error)}"
        ) from error


def generate(
    checkpoint: Checkpoint,
    inputs: Any,
    label: str | None,
    policy: PruningPolicy | None,
    limit: int,
    streamer: Any = None,
) -> Outcome:
    """Generate greedily, pruned by ``policy`` (None = only measured). A streamer waits for every token: not for timing."""
    model = checkpoint.model
    with meter(model) if policy is None else prune(model, policy) as run:
        output = model.generate(
            **inputs, max_new_tokens=limit, do_sample=False, num_beams=1, streamer=streamer
        )
    answer = output[0, inputs["input_ids"].shape[1] :]
    return Outcome(
        policy=label,
        answer=checkpoint.processor.tokenizer.decode(answer, skip_special_tokens=True).strip(),
        kept=tuple(tuple(run.kept_at(i).tolist()) for i in range(len(run.stages))),
        report=run.report(),
        settings=None if policy is None else policy.to_dict(),
    )


def median(outcomes: list[Outcome]) -> Outcome:
    """The first of several equal runs, with the median of each duration."""
    first = outcomes[0]
    runs = [asdict(outcome.report.seconds) for outcome in outcomes]
    seconds = replace(
        first.report.seconds, **{name: statistics.median(r[name] for r in runs) for name in runs[0]}
    )
    return replace(first, report=replace(first.report, seconds=seconds))
