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

    Modes: "graph" = one call replayed from a CUDA graph, between two events, after other data were read into the L2 cache,
    less ``overhead``, the time of a graph of one kernel that does next to nothing; "hot" = the cache is left as it is, a share
    of many calls in one graph; "call" = the host calls and waits, launch overhead included (the only mode on a CPU).
    """

    mode: str
    runs: int
    median: float
    p20: float
    p80: float
    overhead: float = 0.0


def modes(device: torch.device) -> tuple[str, ...]:
    """What can be measured on this device."""
    return GPU_MODES if device.type == "cuda" else ("call",)


def measure(run: Callable[[], Any], device: torch.device, mode: str, seconds: float) -> Timing:
    """Warm up, then repeat for about ``seconds``, at least MIN_RUNS and at most MAX_RUNS times."""
    if mode == "call":
        return summary(mode, _repeated(_host_times(run, device), seconds))
    overhead = graph_overhead(device) if mode == "graph" else 0.0
    times = _repeated(_graph_times(run, device, HOT_COPIES if mode == "hot" else 1), seconds)
    return summary(mode, [t - overhead for t in times], overhead)


def _repeated(times: Iterator[float], seconds: float) -> list[float]:
    taken, end = [], time.perf_counter() + seconds
    for microseconds in times:
        taken.append(microseconds)
        if len(taken) >= MAX_RUNS or (len(taken) >= MIN_RUNS and time.perf_counter() > end):
            break
    return taken


def summary(mode: str, times: list[float], overhead: float = 0.0) -> Timing:
    """Median, 20th and 80th percentile: the nearest run, nothing interpolated."""
    ranked = sorted(times)
    p20, median, p80 = (ranked[round(share * (len(ranked) - 1))] for share in (0.2, 0.5, 0.8))
    return Timing(mode, len(ranked), median, p20, p80, overhead)


@cache
def graph_overhead(device: torch.device) -> float:
    """Microseconds from event to event around a graph of one kernel that writes one number: what every graph pays."""
    x = torch.zeros(1, device=device)
    return summary("graph", _repeated(_graph_times(lambda: x.fill_(1), device, 1), 0.2)).median


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
            _fill_l2(device)
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


def _fill_l2(device: torch.device) -> None:
    """Read other data through the L2 cache, which keeps the GPU busy while the host enqueues the replay.

    Read, not written: written lines would be moved out to memory in the time of what is measured.
    """
    _other_data(device).sum()


@cache
def _other_data(device: torch.device) -> torch.Tensor:
    """Four times the L2 cache, written once."""
    numbers = torch.cuda.get_device_properties(device).L2_cache_size  # of four bytes each
    return torch.zeros(numbers, dtype=torch.float32, device=device)
