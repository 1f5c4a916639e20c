"""The tables of README.md, made from the rows; with --write it is brought up to date, between its markers, with the plot.

python -P studies/where_to_look/tables.py [--write]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # studies/ only: a checkout must stay off the path

from common.rows import Row, find, load
from common.tables import NONE, gain, markdown

from vlmprune.eval.arms import UNPRUNED
from vlmprune.eval.page import percent
from vlmprune.eval.store import write
from where_to_look.measure import OURS, PART, RIGHT, gain_over
from where_to_look.plot import draw_plot

FOLDER = Path(__file__).parent
Cell = Callable[[str, float], list[Row]]
"""The row of a method at a budget, if it has one."""
ROWS, PAGE, PLOT = FOLDER / "glyphworld.csv", FOLDER / "README.md", FOLDER / "accuracy.png"
BEGIN, END = "<!-- tables of {name}: begin -->", "<!-- tables of {name}: end -->"
FAMILIES_AT = (0.83, 0.91)
"""Budgets whose families are shown; the rows have all."""


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="README.md and the plot")
    rows = load(ROWS)
    if parser.parse_args().write:
        write(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), rows).encode())
        write(PLOT, draw_plot(rows))
    else:
        print("\n".join(tables(rows, model) for model in worlds(rows)), end="")


def worlds(rows: Sequence[Row]) -> list[str]:
    """The names of the worlds, in the order of the rows."""
    return list(dict.fromkeys(r.model for r in rows))


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """The page with what stands between the markers of every world made anew.

    Raises:
        ValueError: a world without markers.
    """
    for model in worlds(rows):
        begin, end = BEGIN.format(name=model), END.format(name=model)
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{PAGE.name}: expected {begin} and {end}, got no such lines")
        page = f"{before}{begin}\n{tables(rows, model)}{end}{after}"
    return page


def tables(rows: Sequence[Row], model: str) -> str:
    """Right answers, what each Scout gains, and the families, of one world."""
    some = find(rows, model=model, part=PART)
    gains = {f"What {ours} gains": gains_table(some, ours) for ours in _methods(some, OURS)}
    shown = [budget for budget in _budgets(some) if budget in FAMILIES_AT]
    families = {f"By family at {budget:.0%}": family_table(some, budget) for budget in shown}
    return "\n".join([right_table(some, model), *(_folded(*part) for part in (gains | families).items())])


def _folded(title: str, table: str) -> str:
    """A table that opens with a click."""
    return f"<details><summary>{title}</summary>\n\n{table}\n</details>\n"


def right_table(rows: Sequence[Row], model: str) -> str:
    """Right answers over all questions, every method at every budget; in brackets the 95 % interval."""
    some = find(rows, quantity=RIGHT, family="")
    (whole,) = find(some, method=UNPRUNED)
    title = f"**{model}**, {whole.n} questions, right answers in percent; unpruned {percent(whole.estimate)}:"
    return _table(title, _methods(some), _budgets(some), lambda m, b: find(some, method=m, budget=b))


def gains_table(rows: Sequence[Row], ours: str) -> str:
    """What one Scout has more than every other method, paired, at every budget."""
    some = find(rows, method=ours)

    def against(method: str, budget: float) -> list[Row]:
        return find(some, budget=budget, quantity=gain_over(method))

    others = [UNPRUNED, *(method for method in _methods(rows) if method != ours)]
    others = [m for m in others if any(against(m, b) for b in _budgets(rows))]
    return _table(f"`{ours}` minus each other method, in points:", others, _budgets(rows), against, sign=True)


def family_table(rows: Sequence[Row], budget: float) -> str:
    """Right answers by family at one budget."""
    some = find(rows, quantity=RIGHT)
    families = [family for family in dict.fromkeys(r.family for r in some) if family]
    methods = [m for m in _methods(some) if find(some, method=m, budget=budget)]
    lines = []
    for method, at in ((UNPRUNED, None), *((method, budget) for method in methods)):
        found = [find(some, method=method, budget=at, family=family)[0] for family in families]
        lines.append([method, *(f"{r.mean * 100:.0f}" for r in found)])
    return f"By family at a cut of {budget:.0%}:\n\n{markdown(['method', *families], lines)}\n"


def _table(
    title: str, methods: Sequence[str], budgets: Sequence[float], cell: Cell, sign: bool = False
) -> str:
    lines = ([method, *_cells(cell, method, budgets, sign)] for method in methods)
    return f"{title}\n\n{markdown(['FLOPs cut', *(f'{b:.0%}' for b in budgets)], lines)}\n"


def _cells(cell: Cell, method: str, budgets: Sequence[float], sign: bool) -> Iterator[str]:
    """Mean and interval, ``-`` where a method cannot meet a budget; differences clear of zero in bold."""
    for budget in budgets:
        found = cell(method, budget)
        if not found:
            yield NONE
        else:
            yield (gain if sign else percent)(found[0].estimate)


def _methods(rows: Sequence[Row], beginning: str = "") -> list[str]:
    return [m for m in dict.fromkeys(r.method for r in rows) if m != UNPRUNED and m.startswith(beginning)]


def _budgets(rows: Sequence[Row]) -> list[float]:
    return sorted({r.budget for r in rows if r.budget is not None})


if __name__ == "__main__":
    main()
