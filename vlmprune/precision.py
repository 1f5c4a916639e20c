"""Whether a CPU is slow in a half precision: asked by trying, as no public name says it for every kind of CPU."""

from __future__ import annotations

import time
from functools import cache

import torch

SLOW = 1.5
"""So many times the time of float32 is slow. With instructions of its own a half precision takes less than half of it, without
them three to five times as long."""
ROWS, WIDTH, TRIES = 128, 1024, 3


@cache
def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a floating dtype much slower than float32 ones; tried once a process.

    >>> slow_on_cpu(torch.float32)
    False
    """
    return dtype != torch.float32 and _seconds(dtype) > SLOW * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of a few products: what disturbs one only adds to it."""
    rows, weight = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    times = []
    for _ in range(TRIES + 1):  # the first one warms up
        start = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        times.append(time.perf_counter() - start)
    return min(times[1:])
