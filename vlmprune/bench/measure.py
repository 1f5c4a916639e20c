"""Runs the arms round by round, each round all of them, and takes the time of every phase of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LogitsProcessor, LogitsProcessorList

from vlmprune.bench.arms import Arm
from vlmprune.models import Report, Run
from vlmprune.models.clock import Seconds

PHASES = ("vision", "prefill", "ttft", "decode", "total")
"""Tower and projector; decoder over the prompt with the head; until the first token's logits, with all that ``generate`` does
before; per token behind it; the whole answer."""


@dataclass
class Measured:
    """What the rounds of one arm at one batch size gave.

    Attributes:
        rounds: seconds by phase, one entry a round; what was not seen (inside a graph, say) is not there.
        selection: seconds of every round, of which prefill has them too.
        report: of the last round.
        inputs: tokens of a sample, text included.
        peak_bytes: most memory allocated in a round, on a GPU.
        kernels: how many one answer of one token launches, on a GPU.
        reason: why there is nothing.
    """

    rounds: list[dict[str, float]] = field(default_factory=list)
    selection: list[float] = field(default_factory=list)
    report: Report | None = None
    inputs: int = 0
    peak_bytes: int | None = None
    kernels: int | None = None
    reason: str | None = None


class Ticks(LogitsProcessor):  # type: ignore[misc]
    """When the logits of each new token were there: events on a GPU, so that nobody waits."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self.marks = [self.now()]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Make a mark, and leave the scores alone."""
        self.marks.append(self.now())
        return scores

    def now(self) -> Any:
        """A recorded event, or seconds."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: int, last: int) -> float:
        """Seconds from one mark to another; on a GPU this waits for the second."""
        a, b = self.marks[first], self.marks[last]
        if not self.gpu:
            return float(b - a)
        b.synchronize()
        return float(a.elapsed_time(b)) / 1000


def answer(model: Any, inputs: Mapping[str, Any], new_tokens: int, ticks: Ticks | None = None) -> None:
    """Generate exactly so many tokens, greedily."""
    processors = LogitsProcessorList([] if ticks is None else [ticks])
    settings = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "num_beams": 1,
    }
    with torch.inference_mode():
        model.generate(**inputs, logits_processor=processors, **settings)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def take_time(model: Any, inputs: Mapping[str, Any], run: Run, new_tokens: int) -> dict[str, float]:
    """Seconds by phase of one answer; a phase that no hook saw is left out."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    start, ticks = time.perf_counter(), Ticks(model.device)
    answer(model, inputs, new_tokens, ticks)
    total = time.perf_counter() - start
    seen: Seconds = run.report().seconds
    taken = {"vision": seen.vision, "prefill": seen.prefill, "ttft": ticks.between(0, 1), "total": total}
    if new_tokens > 1:
        taken["decode"] = ticks.between(1, -1) / (new_tokens - 1)
    return {phase: seconds for phase, seconds in taken.items() if seconds > 0}


def count_kernels(call: Callable[[], object]) -> int:
    """Kernels that one call starts on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
    on_device = (e.name for e in seen.events() if e.device_type == torch._C._autograd.DeviceType.CUDA)
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


def measure(
    model: Any,
    arms: Sequence[Arm],
    batch: int,
    new_tokens: int,
    rounds: int,
    warm_up: int,
    tell: Callable[[str], None],
) -> list[Measured]:
    """Measure arms at one batch size, one entry each.

    In each round an arm's scope is entered, its prompt answered ``warm_up`` times with one token, and timed once.
    What runs out of memory is left out from then on.
    """
    found = [Measured(reason=arm.reason) for arm in arms]
    for number in range(rounds):
        for arm, measured in zip(arms, found, strict=True):
            if measured.reason is None:
                try:
                    _round(model, arm, measured, batch, new_tokens, warm_up, count=number == 0)
                except torch.OutOfMemoryError:
                    measured.reason = f"out of memory at batch {batch}"
                    measured.rounds.clear()
                if measured.reason is not None:  # outside of the handler, which holds on to the tensors
                    torch.cuda.empty_cache()
            tell(f"batch {batch}, round {number + 1} of {rounds}")
    return found


def _round(
    model: Any, arm: Arm, measured: Measured, batch: int, new_tokens: int, warm_up: int, count: bool
) -> None:
    gpu = model.device.type == "cuda"
    with arm.scope(model) as run:
        inputs = arm.prompt.inputs(model.config, batch, model.device, model.dtype)
        for _ in range(warm_up):
            answer(model, inputs, 1)
        if gpu:
            torch.cuda.reset_peak_memory_stats(model.device)
        measured.rounds.append(take_time(model, inputs, run, new_tokens))
        if gpu:
            measured.peak_bytes = max(measured.peak_bytes or 0, torch.cuda.max_memory_allocated(model.device))
        measured.report, measured.inputs = run.report(), inputs["input_ids"].shape[1]
        measured.selection.append(measured.report.seconds.selection)
        if gpu and count:
            measured.kernels = count_kernels(lambda: answer(model, inputs, 1))
