"""One question to one model: greedy generations with one policy become an Outcome."""

from __future__ import annotations

import statistics
from dataclasses import astuple, dataclass, replace
from typing import Any

from vlmprune.checkpoints import Checkpoint, generate
from vlmprune.models import Report
from vlmprune.models.clock import Seconds
from vlmprune.policies.base import PruningPolicy


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


def run_once(
    checkpoint: Checkpoint, inputs: Any, label: str | None, policy: PruningPolicy | None, limit: int
) -> Outcome:
    """Generate up to ``limit`` tokens, pruned by ``policy`` (None = only measured)."""
    run, (answer,) = generate(checkpoint.model, inputs, policy, max_new_tokens=limit)
    return Outcome(
        policy=label,
        answer=checkpoint.processor.tokenizer.decode(answer, skip_special_tokens=True).strip(),
        kept=tuple(tuple(run.kept_at(i).tolist()) for i in range(len(run.stages))),
        report=run.report(),
        settings=None if policy is None else policy.to_dict(),
    )


def median(outcomes: list[Outcome]) -> Outcome:
    """The first of several equal runs, with the median of each duration."""
    first, runs = outcomes[0].report, [astuple(outcome.report.seconds) for outcome in outcomes]
    seconds = Seconds(*map(statistics.median, zip(*runs, strict=True)))
    captions = statistics.median(outcome.report.caption_seconds for outcome in outcomes)
    return replace(outcomes[0], report=replace(first, seconds=seconds, caption_seconds=captions))
