"""What the model takes for granted of a GPU: every constant with a better, a typical and a worse value, and where it is from.

None was measured here. "Assumed" is what one would guess from other GPUs or from published orders of magnitude; on the first
day on a GPU these are to be replaced by what was measured.
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

SMS = 132  # H100 SXM and H200
SCHEDULERS = 4  # of a multiprocessor
MAX_WARPS, MAX_BLOCKS = 64, 32  # of a multiprocessor (CUDA programming guide, compute capability 9.0)
REGISTERS, REGISTER_UNIT = 65536, 256  # of a multiprocessor, and given to a warp at a time (the same)
SHARED, SHARED_RESERVED = (
    233472,
    1024,
)  # bytes of a multiprocessor, and of each block for the system (the same)


class Constant(NamedTuple):
    """A number nobody measured for this: three values of it, and where they come from."""

    better: float
    typical: float
    worse: float
    source: str


CARDS = {
    "H100": {
        "clock": Constant(1.98, 1.9, 1.7, "GHz; assumed: 1.98 is the highest, less under load"),
        "bandwidth": Constant(3.1, 2.95, 2.7, "TB/s; assumed: 80 to 93 % of the data sheet's 3.35 (SXM)"),
    },
    "H200": {
        "clock": Constant(1.98, 1.9, 1.7, "GHz; assumed: 1.98 is the highest, less under load"),
        "bandwidth": Constant(4.4, 4.1, 3.8, "TB/s; assumed: 80 to 92 % of the data sheet's 4.8"),
    },
}
COMMON = {
    "node": Constant(0.5, 0.8, 1.2, "us that a further launch takes beside its programs' time; assumed"),
    "gap": Constant(0.8, 1.3, 2.0, "us between two nodes of a CUDA graph; assumed"),
    "model": Constant(0.8, 1.0, 1.25, "a factor: what the model leaves out, contention above all; assumed"),
}
# of a program's way through its code: cycles, unless it says otherwise
STEPS = {
    "dram": Constant(500, 700, 1000, "a load from memory; assumed, published: some 400 to 800"),
    "l2": Constant(220, 280, 340, "a load from L2; assumed, published: some 200 to 340 by distance"),
    "atomic": Constant(
        350, 500, 800, "an atomic with an answer; assumed: a trip to L2 and back, and some work"
    ),
    "fence": Constant(300, 600, 1000, "MEMBAR.GPU: until the stores before it are in L2; assumed"),
    "shared": Constant(26, 30, 34, "a load from shared memory; assumed, published: some 30"),
    "shuffle": Constant(22, 25, 30, "assumed"),
    "special": Constant(18, 24, 40, "MUFU, POPC, conversions; assumed"),
    "mma": Constant(30, 33, 36, "a dependent HMMA; assumed, published for an A100: 33"),
    "start": Constant(30, 40, 60, "special registers and constants; assumed"),
    "fixed": Constant(4, 5, 6, "a dependent arithmetic instruction; assumed, published: 4 to 6"),
    "barrier": Constant(16, 30, 45, "after the last warp of a block has come; assumed"),
    "conflict": Constant(1, 4, 16, "passes of an atomic on shared memory; assumed"),
    "fetch": Constant(0, 8, 30, "per 128 bytes of code met for the first time; assumed: 0 if it is cached"),
    "in_step": Constant(0.0, 0.5, 1.0, "share of its waits that a warp's neighbours leave unused; assumed"),
    "rounds": Constant(
        0.6,
        0.88,
        1.2,
        "of the search, for each doubling of the columns: counted (tests/benchmarks/test_search_rounds.py)",
    ),
}
Steps = namedtuple("Steps", STEPS)


class Guess(NamedTuple):
    """A value for every constant."""

    clock: float
    bandwidth: float
    node: float
    gap: float
    model: float
    steps: Steps


def guess(card: str, name: str | None = None, level: str = "typical") -> Guess:
    """Every constant of a card as it typically is, the one called ``name`` at ``level``."""

    def values(constants: dict[str, Constant]) -> dict[str, float]:
        return {n: getattr(c, level if n == name else "typical") for n, c in constants.items()}

    return Guess(**values(CARDS[card]), **values(COMMON), steps=Steps(**values(STEPS)))


def names() -> list[str]:
    """Every constant."""
    return [*next(iter(CARDS.values())), *COMMON, *STEPS]
