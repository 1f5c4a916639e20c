"""Measures what a device does at best: a large matrix product, and a large copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from vlmprune.bench.roofline import Peaks

SECONDS, FEWEST = 0.3, 3
SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrices
NUMBERS = {"cuda": 1 << 28, "cpu": 1 << 25}  # of four bytes each, far more than any cache


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Rates of a square matrix product in ``dtype`` and of a copy, medians of about a third of a second each."""
    kind = device.type
    a, b = (torch.randn(SIDE[kind], SIDE[kind], device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _median(lambda: torch.mm(a, b, out=out), device)
    source = torch.ones(NUMBERS[kind], device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device)
    return Peaks(2 * SIDE[kind] ** 3 / product, 2 * source.numel() * source.element_size() / copy)


def _median(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the first left out."""
    call()
    taken: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(taken) < FEWEST or time.perf_counter() < end:
        taken.append(_seconds(call, device))
    return statistics.median(taken)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000
