"""Milliseconds of selection, prefill and a decode step at one point: so many tokens an image, images and prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vlmprune

from .model import WORD, make_prompt

UNPRUNED = "unpruned"
PHASES = ("selection", "prefill", "decode")
STEPS = 8  # decode steps behind each prefill


@dataclass(frozen=True)
class Point:
    """What is measured: one policy, at so many visual tokens an image, images a prompt and prompts a batch."""

    axis: str  # which of these three is varied: "visual", "images" or "batch"
    policy: str
    tokens: int
    images: int = 1
    batch: int = 1

    @property
    def at(self) -> int:
        """Where it stands on its axis."""
        return {"visual": self.tokens, "images": self.images, "batch": self.batch}[self.axis]


def measure(model: Any, point: Point, repeat: int, seconds: float) -> dict[str, Any]:
    """The point's columns: median, p20 and p80 of each phase, empty where there is none.

    Prefills, each with ``STEPS`` decode steps, go on until ``repeat`` of them are timed or ``seconds`` are over; the first is
    not timed, the second always is. Raises RuntimeError for logits that are not finite.
    """
    prompt = make_prompt(model, point.tokens, point.images, point.batch)
    policy = None if point.policy == UNPRUNED else vlmprune.policy_from(point.policy)
    taken: dict[str, list[float]] = {phase: [] for phase in PHASES}
    end = time.perf_counter() + seconds
    with torch.no_grad(), nullcontext() if policy is None else vlmprune.prune(model, policy) as run:
        for turn in range(1 + repeat):
            if turn > 1 and time.perf_counter() > end:
                break
            found = _once(model, prompt)
            report = None if policy is None else run.report()
            if report is not None:
                found["selection"] = 1e3 * report.seconds.selection
            for phase, ms in found.items() if turn else ():
                taken[phase].append(ms)
    kept = point.tokens * point.images if report is None else round(report.tokens.after_last_stage)
    columns: dict[str, Any] = {"kept": kept, "runs": len(taken["prefill"])}
    for phase, times in taken.items():
        columns |= {f"{phase}_{name}_ms": ms for name, ms in _percentiles(times).items()}
    return columns


def _once(model: Any, prompt: dict[str, Tensor]) -> dict[str, float]:
    """A prefill and some decode steps."""
    batch, length = prompt["input_ids"].shape
    out, prefill = _timed(model.device, lambda: model(**prompt, use_cache=True, logits_to_keep=1))
    if not out.logits.isfinite().all():
        raise RuntimeError(f"logits: expected finite numbers, got {out.logits}")
    word = torch.full((batch, 1), WORD, device=model.device)

    def decode() -> None:
        for step in range(STEPS):
            at = torch.full((batch, 1), length + step, device=model.device)
            model(input_ids=word, position_ids=at, past_key_values=out.past_key_values)

    return {"prefill": prefill, "decode": _timed(model.device, decode)[1] / STEPS}


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the milliseconds until its work is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    out = call()
    wait()
    return out, 1e3 * (time.perf_counter() - start)


def _percentiles(times: list[float]) -> dict[str, float | str]:
    if not times:
        return dict.fromkeys(("median", "p20", "p80"), "")
    if len(times) == 1:
        return dict.fromkeys(("median", "p20", "p80"), round(times[0], 4))
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": round(statistics.median(times), 4), "p20": round(low, 4), "p80": round(high, 4)}
