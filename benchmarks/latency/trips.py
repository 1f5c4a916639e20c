"""What the machine code does not say: who runs which part of a kernel, and how often its loops go round at a shape.

The one place to change when a kernel does. A loop that stands in no table is an error, and so is a kernel that counts its
programs in more or less often than its parts say. What goes unseen is a loop that looks as before and means something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from vlmprune.triton_kernels._score import PARTS_AT_ONCE

from .cards import Steps
from .launches import Compiled
from .sass import Source

Trips = Callable[[Compiled, Steps], float]


class Part(NamedTuple):
    """Code of a kernel up to where programs count themselves in, or to its end."""

    column: str  # of the table
    by: str  # "every" program, the last of each "tile", or the last "one"
    memory: str  # where most of its loads end: in "dram" or "l2"


def parts(launch: Compiled) -> list[Part]:
    """The parts of a kernel, in their order."""
    found = PARTS.get(launch.name)
    if found is None:
        raise LookupError(f"kernel: expected one of {', '.join(PARTS)}, got {launch.name}")
    return found(launch)


def _score_parts(launch: Compiled) -> list[Part]:
    a, out = launch.arguments, [Part("score", "every", "dram")]
    if a.SPLIT:
        out.append(Part("join", "tile", "l2"))
    if a.SELECTS:
        out.append(Part("select", "one", "l2"))
    return out


PARTS: dict[str, Callable[[Compiled], list[Part]]] = {
    "_score_select_kernel": _score_parts,
    "_select_columns_kernel": lambda launch: [Part("select", "every", "l2")],
    "_gather_tokens_kernel": lambda launch: [Part("gather", "every", "dram")],
}


def _times(n: float, step: float) -> int:
    return math.ceil(n / step)


def _shared(launch: Compiled) -> bool:
    """Whether several programs choose in a sample, each from CHUNK columns."""
    return launch.name == "_select_columns_kernel" and launch.grid[0] > 1


def _columns(launch: Compiled, _: Steps) -> int:
    """Passes of a program over its columns."""
    return 1 if _shared(launch) else _times(launch.arguments.N, launch.arguments.CHUNK)


def _positions(launch: Compiled, _: Steps) -> int:
    """Passes over its positions, by the program that has most: the first or the last, which have the text as well."""
    a = launch.arguments
    return _times(a.CHUNK + a.positions - a.N if _shared(launch) else a.positions, a.CHUNK)


def _keys(launch: Compiled, _: Steps) -> int:
    """Passes over keys that registers do not hold."""
    return _times(launch.arguments.N, launch.arguments.KEYS)


def _ahead(launch: Compiled, _: Steps) -> int:
    """Passes over the columns before its own, by the program that has most."""
    return launch.grid[0] - 1


def _never(*_: object) -> int:
    return 0


# function -> first line of the loop, or the call of the function where that decides -> how often the loop goes round
LOOPS: dict[str, dict[str, Trips]] = {
    "score_part": {"for h_kv in range(h_first, h_last)": lambda x, _: x.arguments.heads},
    "join_parts": {
        "for first in range(0, parts, PARTS_AT_ONCE)": lambda x, _: _times(x.grid[1], PARTS_AT_ONCE.value)
    },
    "_last_kept": {
        "while (low < high) & (from_low != need) & (above != need)": lambda x, steps: (
            steps.rounds * math.log2(x.arguments.N)
        )
    },
    "_survey": {"for start in range(0, KEYS if IN_REGISTERS else row[3], KEYS)": _keys},
    "_count_from": {"for start in range(0, row[3], KEYS)": _keys},
    "count_before": {"for start in range(0, stop, CHUNK)": _ahead},
    "number_columns": {"for at in range(start, stop, CHUNK)": _columns},
    "_place_positions": {"for start in range(span[0], span[1], CHUNK)": _positions},
    "_fill": {
        "_fill(marks_ptr, start, stop, NO_COLUMN, CHUNK)": _positions,
        # what follows is for columns in the past, and for outputs with room left: the benchmark has neither
        "_fill(places_ptr, 0, most, -1, CHUNK)": _never,
        "_fill(kept_ptr, n, most, -1, CHUNK)": _never,
        "_fill(places_ptr, n, most, -1, CHUNK)": _never,
        "_fill(index_ptr, taken, width, -1, CHUNK)": _never,
    },
}


def trips(source: Source | None, launch: Compiled, steps: Steps) -> float:
    """How often a loop goes round."""
    if source is None:
        raise LookupError(
            f"loop: expected one that a line of Python stands for, got one of {launch.name} without"
        )
    entries = LOOPS.get(source.function, {})
    found = entries.get(source.header) or entries.get(source.call or "")
    if found is not None:
        return found(launch, steps)
    if source.call is None and entries and all(key.startswith(f"{source.function}(") for key in entries):
        # Triton 3.6 does not say where a function was called: as if by the call that takes longest
        return max(entry(launch, steps) for entry in entries.values())
    raise LookupError(
        f"loop: expected an entry of LOOPS in {__name__}, got none for {source} ({launch.name})"
    )
