"""What prune_tokens would take on an H100 and an H200: a prediction from its machine code, no measurement.

The launches of the five shapes (bf16, one scoring row, its log-sum-exp given, one prompt) are compiled as they are, without a
GPU; ``latency/`` walks through their machine code with a table of assumed constants. What a graph of one node takes is not
counted, as the benchmark takes it off, and every launch begins when the one before it has ended (VLMPRUNE_PDL=0).

    python -P benchmarks/model_latency.py                      # the table; --rows FILE.csv adds what was measured
    python -P benchmarks/model_latency.py --markdown           # the one in benchmarks/README.md
    python -P benchmarks/model_latency.py --loops              # every loop of these kernels
    python -P benchmarks/model_latency.py --loops "prune bf16" # of a launch of the compile tests, by name
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from gpu_day.goals import OURS, Results, limit_us
from latency import sass
from latency.cards import CARDS, guess
from latency.launches import Compiled, compiled_launches
from latency.predict import COLUMNS, Prediction, predict, sections
from latency.trips import LOOPS, trips
from micro.rows import read
from micro.shapes import SHAPES
from micro.table import print_table

from vlmprune import env

ROOT = Path(__file__).parents[1]
TYPICAL = guess("H200").steps  # the same on every card
COUNTS = ("instructions", *sass.COUNTED)
WIDEST = 70  # of a loop's name


class Line(NamedTuple):
    """A shape on a card."""

    shape: str
    card: str
    prediction: Prediction
    limit: float  # us of the goal
    measured: float | None


def table(rows: list[dict[str, str]]) -> list[Line]:
    """Every shape on every card."""
    out = []
    for shape in SHAPES:
        launches = compiled_launches(shape)
        predicted = {card: predict(shape, launches, card) for card in CARDS}
        for card, prediction in predicted.items():
            results = Results([row for row in rows if card in row["device"]])
            best = results.of("prune_tokens", shape.name, *OURS)
            limit = limit_us(shape.name, guess(card).bandwidth * 1e3)
            out.append(Line(shape.name, card, prediction, limit, None if best is None else best.us))
    return out


def _us(x: float | None) -> str:
    return "" if x is None else f"{x:.0f}" if x >= 9.95 else f"{x:.1f}"


def _range(p: Prediction) -> str:
    return f"{_us(p.low)} to {_us(p.high)}"


def show(lines: list[Line]) -> None:
    """On the terminal."""
    heads = ("shape", "card", *COLUMNS, "total", "low to high", "bytes floor", "limit", "measured")
    cells = [
        (
            *(x.shape, x.card, *(_us(x.prediction.columns[name]) for name in COLUMNS)),
            *(_us(x.prediction.total), _range(x.prediction), _us(x.prediction.floor)),
            *(_us(x.limit), _us(x.measured)),
        )
        for x in lines
    ]
    print_table(f"predicted, not measured: us (triton {triton.__version__})", heads, cells, range(2, 20), 1)


def markdown(lines: list[Line]) -> Iterator[str]:
    """The table of benchmarks/README.md, line by line."""
    yield "| us | card | bytes floor | predicted | low to high | limit | measured |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for x in lines:
        p = x.prediction
        cells = (x.shape, x.card, _us(p.floor), _us(p.total), _range(p), _us(x.limit), _us(x.measured))
        yield f"| {' | '.join(cells)} |"


def _counts(code: sass.Code, loop: sass.Loop) -> list[str]:
    counts = code.counts(loop)
    return [str(counts[name] or "") for name in COUNTS]


def _name(source: sass.Source | None) -> str:
    """A loop's name in a listing: the call of its function where that decides how often it goes round."""
    if source is None:
        return "not a loop of Python"
    by_call = source.call is not None and source.call in LOOPS.get(source.function, {})
    text = f"{source.call}" if by_call else f"{source.function}: {source.header}"
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def show_loops() -> None:
    """Parts and loops of the kernels that each shape launches."""
    for shape in SHAPES:
        for x in compiled_launches(shape):
            title = f"\n{shape.name}: {x.name}, grid {x.grid}, {x.warps} warps, {x.registers} registers, "
            title += f"{x.shared} bytes of shared memory, {x.resident} on a multiprocessor"
            _print_loops(title, [line for part in sections(x) for line in _part(x, *part)])


def _part(x: Compiled, part: object, first: int, last: int) -> Iterator[list[str]]:
    """Lines of a part of a kernel: all of it, then its loops."""
    yield [f"{part.column} ({part.by})", "", *_counts(x.code, sass.Loop(first, last, None))]  # type: ignore[attr-defined]
    for depth, loop in x.code.every_loop():
        if first <= loop.first <= last:
            name = "  " * (depth + 1) + _name(loop.source)
            yield [name, f"{trips(loop.source, x, TYPICAL):g}", *_counts(x.code, loop)]


def show_loops_of(names: list[str]) -> None:
    """Loops of the kernels of launches of the compile tests."""
    sys.path.insert(0, str(ROOT / "tests" / "_lib"))
    from helpers import offline, resources

    for name in names:
        if name not in resources.launches():
            raise SystemExit(f"--loops: expected one of {', '.join(resources.launches())}, got {name}")
        for kernel in offline.compile_launches(resources.launches()[name], 90):
            code = sass.parse(sass.disassemble(kernel.binary))
            whole = ["all", "", *_counts(code, sass.Loop(0, len(code.instructions) - 1, None))]
            loops = [
                ["  " * (depth + 1) + _name(loop.source), "", *_counts(code, loop)]
                for depth, loop in code.every_loop()
            ]
            _print_loops(f"\n{name}: {kernel.summary()}", [whole, *loops])


def _print_loops(title: str, lines: list[list[str]]) -> None:
    print_table(title, ("part, loops in it", "times", *COUNTS), lines, range(1, 20), 0)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=Path, help="CSV of microbench.py: what was measured, beside the prediction"
    )
    parser.add_argument("--markdown", action="store_true", help="the table of benchmarks/README.md")
    parser.add_argument("--loops", nargs="*", metavar="LAUNCH", help="loops instead of times")
    chosen = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("model_latency: expected TRITON_INTERPRET=0, got the interpreter")
    if env.PDL:
        raise SystemExit("model_latency: expected VLMPRUNE_PDL=0, got 1, whose launches overlap")
    if chosen.loops:
        show_loops_of(chosen.loops)
    elif chosen.loops is not None:
        show_loops()
    else:
        lines = table([] if chosen.rows is None else read(chosen.rows))
        if chosen.markdown:
            print("\n".join(markdown(lines)))
        else:
            show(lines)


if __name__ == "__main__":
    main()
