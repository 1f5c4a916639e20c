"""Microseconds of prune_tokens on a card, launch by launch and part by part, and how far off they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from micro import fewest
from micro.shapes import Shape

from .cards import SCHEDULERS, SMS, Guess, Steps, guess, names
from .launches import Compiled, MetaInputs
from .sass import ATOMICS
from .trips import Part, parts, trips
from .warp import Warp, walked

COLUMNS = ("score", "join", "select", "gather", "gaps")


@dataclass(frozen=True)
class Prediction:
    """Microseconds.

    Attributes:
        columns: of each column of the table.
        total: of all of them.
        low, high: with every constant in turn at its better and its worse value, as independent errors add up.
        floor: of the bytes alone.
    """

    columns: dict[str, float]
    total: float
    low: float
    high: float
    floor: float


def predict(shape: Shape, launches: Sequence[Compiled], card: str) -> Prediction:
    """What the launches of a shape take on a card."""
    traffic = fewest_bytes(shape)

    def total(*varied: str) -> float:
        return sum(_columns(traffic, launches, guess(card, *varied)).values())

    def error(level: str, sign: int) -> float:
        return math.hypot(*(max(0.0, sign * (total(name, level) - typical)) for name in names()))

    columns, typical = _columns(traffic, launches, guess(card)), total()
    floor = sum(traffic.values()) / (guess(card).bandwidth * 1e6)
    return Prediction(columns, typical, typical - error("better", -1), typical + error("worse", 1), floor)


def fewest_bytes(shape: Shape) -> dict[str, int]:
    """Bytes that any version must move, by the column of who moves them."""
    x = MetaInputs(shape)
    return {"score": fewest.score_bytes(x), "gather": fewest.copy_bytes(x.tensors, shape.kept)}


def _columns(traffic: dict[str, int], launches: Sequence[Compiled], g: Guess) -> dict[str, float]:
    """Microseconds by column."""
    out = dict.fromkeys(COLUMNS, 0.0)
    for launch in launches:
        for part, first, last in sections(launch):
            us = _cycles(launch, part, first, last, g.steps) / (g.clock * 1e3)
            if part.column in traffic and part.by == "every":
                us = max(us, g.steps.dram / (g.clock * 1e3) + traffic[part.column] / (g.bandwidth * 1e6))
            out[part.column] += us
    out["gaps"] = (len(launches) - 1) * (
        g.node + g.gap
    )  # a measurement takes off what a graph of one node takes
    return {name: us * g.model for name, us in out.items()}


@cache
def sections(launch: Compiled) -> list[tuple[Part, int, int]]:
    """(part, first instruction, last instruction): a part ends with the atomic by which programs count themselves in."""
    code, expected = launch.code.instructions, parts(launch)
    ends = [i for i, x in enumerate(code) if x.base in ATOMICS]
    if len(ends) != len(expected) - 1:
        columns = ", ".join(part.column for part in expected)
        raise ValueError(
            f"{launch.name}: expected an atomic between any two of {columns}, got {len(ends)} atomics"
        )
    for _, loop in launch.code.every_loop():
        twins = [x.source for _, x in launch.code.every_loop() if x.source == loop.source]
        if loop.source is not None and loop.source.call is not None and len(twins) > 1:
            raise ValueError(
                f"{launch.name}: expected one loop, got {len(twins)} (unrolled?) of {loop.source}"
            )
        if any(loop.first <= end <= loop.last for end in ends):
            raise ValueError(f"{launch.name}: expected no atomic in a loop, got one in {loop.source}")
    starts = [0, *(end + 1 for end in ends)]
    return list(zip(expected, starts, [*ends, len(code) - 1], strict=True))


@cache
def _cycles(launch: Compiled, part: Part, first: int, last: int, steps: Steps) -> float:
    """Until the last program of a part is done: those that a multiprocessor holds run together, the others after them."""

    def together(programs: int) -> float:
        load = max(1.0, launch.warps * programs / SCHEDULERS)
        warp = Warp(steps, getattr(steps, part.memory), load)
        return walked(warp, launch.code, first, last, lambda loop: trips(loop.source, launch, steps))

    programs = {"every": launch.programs, "tile": launch.grid[0] * launch.grid[2], "one": 1}[part.by]
    waves, rest = divmod(math.ceil(programs / SMS), launch.resident)
    return (waves * together(launch.resident) if waves else 0.0) + (together(rest) if rest else 0.0)
