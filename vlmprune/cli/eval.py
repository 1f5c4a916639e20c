"""What the ``eval`` command shows: budgets as they are typed, and the tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from vlmprune.cli.console import OPEN, table
from vlmprune.cli.options import read_numbers
from vlmprune.errors import check
from vlmprune.eval import BUDGETS, Evaluation
from vlmprune.eval.page import HEADS, NAMES, family_cells, summary_cells


def read_budgets(text: str | None, keep: bool) -> tuple[float, ...]:
    """FLOPs cuts from ``0.48,0.64``; none with ``--keep``. Raises InputError for what is no number."""
    check(text is None or not keep, "budgets", "either --budgets or --keep", "both")
    if keep or text is None:
        return () if keep else BUDGETS
    return tuple(dict.fromkeys(read_numbers(text, float, "budgets")))


def read_baselines(wanted: bool, named: Sequence[str]) -> bool | tuple[str, ...]:
    """All or none, or the named ones. Raises InputError for names beside ``--no-baselines``."""
    check(wanted or not named, "baseline", "either --baseline or --no-baselines", "both")
    return tuple(named) or wanted


def show(found: Evaluation) -> None:
    """Print the table, the families below it, and where everything is."""
    console, results = Console(), found.results
    families = (*NAMES, *results[0].families)
    for heads, cells in ((HEADS, summary_cells), (families, family_cells)):
        rows = (one_setting_a_line(cells(result)) for result in results)
        console.print(table(heads, rows, **OPEN))
        console.print()
    if "left_out" in found.settings:
        console.print(Text(f"left out: {found.settings['left_out']}", style="dim"))
    rate = f"{found.speed:.1f} answers/s, everything included" if found.speed else "nothing left to ask"
    precision, batch = found.settings["precision"], found.settings["batch_size"]
    note = f"{results[0].all.questions} questions, {precision}, batches of {batch}; {rate}."
    console.print(Text(f"{note}\nreport: {found.page}", style="dim"))


def one_setting_a_line(cells: Sequence[str]) -> list[str]:
    """Cells of a row whose first names a method, which is then as narrow as its longest setting."""
    method, *rest = cells
    return [method.replace(":", "\n").replace(",", "\n"), *rest]
