"""Time of one call: how it is taken on a GPU and on a CPU, and what of it is reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

GPU_MODES = ("graph", "hot", "call")
MIN_RUNS, MAX_RUNS = 3, 200
HOT_COPIES = 20  # calls in one graph; their mean hides the gap between event and graph


@dataclass(frozen=True)
class Timing:
    """Percentiles in microseconds.

    Modes: "graph" = one call replayed from a CUDA graph, between two events, after the L2 cache was overwritten;
    "hot" = the same without overwriting it, a share of many calls in one graph; "call" = the host calls and waits,
    launch overhead included (the only mode on a CPU).
    """

    mode: str
    runs: int
    median: float
    p20: float
    p80: float


def modes(device: torch.device) -> tuple[str, ...]:
    """What can be measured on this device."""
    return GPU_MODES if device.type == "cuda" else ("call",)


def measure(run: Callable[[], Any], device: torch.device, mode: str, seconds: float) -> Timing:
    """Warm up, then repeat for about ``seconds``, at least MIN_RUNS and at most MAX_RUNS times."""
    if mode == "call":
        times = _host_times(run, device)
    else:
        times = _graph_times(run, device, HOT_COPIES if mode == "hot" else 1)
    taken, end = [], time.perf_counter() + seconds
    for microseconds in times:
        taken.append(microseconds)
        if len(taken) >= MAX_RUNS or (len(taken) >= MIN_RUNS and time.perf_counter() > end):
            break
    return summary(mode, taken)


def summary(mode: str, times: list[float]) -> Timing:
    """Median, 20th and 80th percentile: the nearest run, nothing interpolated."""
    ranked = sorted(times)
    p20, median, p80 = (ranked[round(share * (len(ranked) - 1))] for share in (0.2, 0.5, 0.8))
    return Timing(mode, len(ranked), median, p20, p80)


def _host_times(run: Callable[[], Any], device: torch.device) -> Iterator[float]:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    while True:
        wait()
        start = time.perf_counter()
        run()
        wait()
        yield 1e6 * (time.perf_counter() - start)


def _graph_times(run: Callable[[], Any], device: torch.device, copies: int) -> Iterator[float]:
    graph = capture(run, copies)
    while True:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if copies == 1:
            _l2_flush(device).zero_()
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        yield 1e3 * first.elapsed_time(last) / copies


def capture(run: Callable[[], Any], copies: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``copies`` calls; whatever compiles or tunes itself does so before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            run()
    return graph


@cache
def _l2_flush(device: torch.device) -> torch.Tensor:
    """Four times the L2 cache; overwriting it also keeps the GPU busy while the host enqueues the replay."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(4 * size, dtype=torch.uint8, device=device)
