"""What this device can do at best, measured: the rates that floors and shares are computed with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .clock import graph_overhead, measure
from .shapes import Setting


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device.

    Attributes:
        copy: bytes per second of a large copy, read plus written.
        matmul: FLOPs per second of a large matrix product, by dtype.
    """

    copy: float
    matmul: dict[torch.dtype, float]

    def floor_us(self, traffic: int, work: int, dtype: torch.dtype) -> float:
        """No version runs faster: the larger of the time to move the bytes and the time to do the arithmetic."""
        return 1e6 * max(traffic / self.copy, work / self.matmul[dtype])

    def prefill_us(self, setting: Setting) -> float:
        """The unpruned prefill of the decoder if all its FLOPs ran at the rate of the large product: a lower bound."""
        return 1e6 * setting.shape.prefill_flops / self.matmul[setting.dtype]


def measure_ceilings(device: torch.device, dtypes: list[torch.dtype], seconds: float = 0.3) -> Ceilings:
    """A copy far larger than any cache, and one square matrix product per dtype, on normal numbers."""
    rates = {dtype: _matmul_rate(device, dtype, seconds) for dtype in dtypes}
    return Ceilings(_copy_rate(device, seconds), rates)


def _mode(device: torch.device) -> str:
    return "graph" if device.type == "cuda" else "call"


def _copy_rate(device: torch.device, seconds: float) -> float:
    source = torch.randn(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, _mode(device), seconds)
    return 1e6 * 2 * source.numel() * source.element_size() / timing.median


def _matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = measure(lambda: torch.mm(a, b, out=out), device, _mode(device), seconds)
    return 1e6 * 2 * n**3 / timing.median


def gaps(device: torch.device) -> dict[str, float]:
    """Microseconds per launch of a tiny kernel: from a loop on the host, as a node of a graph, as a graph of its own."""
    x = torch.zeros(1, device=device)
    many = 100

    def launches() -> None:
        for _ in range(many):
            x.add_(1)

    return {
        "host launch": measure(launches, device, "call", 0.5).median / many,
        "graph node": measure(launches, device, "graph", 0.5).median / many,
        "graph of one node": graph_overhead(device),
    }
