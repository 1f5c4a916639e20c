"""How a time grows: the exponent of a power law, by least squares in log-log, and its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .measure import PHASES

AXES = ("visual", "images", "batch")


class Fit(NamedTuple):
    """``time = c * x ** exponent``."""

    axis: str
    policy: str
    phase: str
    exponent: float
    error: float | None  # standard error of the exponent; two points leave none
    points: int
    first: float  # where on the axis
    last: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" if self.error is None else f"{self.exponent:.2f} +- {self.error:.2f}"


def power(x: Sequence[float], y: Sequence[float]) -> tuple[float, float | None]:
    """The exponent of ``y`` in ``x`` and its standard error. Raises ValueError for fewer than two different ``x``."""
    if len(set(x)) < 2:
        raise ValueError(f"x: expected two different values at least, got {sorted(set(x))}")
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    left = sum((b - mean_v - slope * (a - mean_u)) ** 2 for a, b in zip(u, v, strict=True))
    return slope, math.sqrt(left / (len(u) - 2) / spread) if len(u) > 2 else None


def lines_of(rows: Sequence[dict[str, str]], axis: str, phase: str) -> dict[str, list[tuple[float, float]]]:
    """By policy the points ``(place on the axis, median ms)``, ascending."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["axis"] == axis and row[f"{phase}_median_ms"]:
            found.setdefault(row["policy"], []).append((float(row["at"]), float(row[f"{phase}_median_ms"])))
    return {policy: sorted(points) for policy, points in found.items()}


def fits(rows: Sequence[dict[str, str]], least: float) -> list[Fit]:
    """Every line with two points or more; of the axis of visual tokens those from ``least`` on."""
    out = []
    for axis in AXES:
        for phase in PHASES:
            for policy, points in lines_of(rows, axis, phase).items():
                used = [p for p in points if axis != "visual" or p[0] >= least]
                if len(used) > 1:
                    x, y = zip(*used, strict=True)
                    out.append(Fit(axis, policy, phase, *power(x, y), len(used), x[0], x[-1]))
    return out
