"""What the ``eval`` command shows: budgets as they are typed, a progress bar, and the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vlmprune.cli.progress import bar
from vlmprune.errors import InputError, check
from vlmprune.eval import BUDGETS, Evaluation
from vlmprune.eval.evaluation import Progress
from vlmprune.eval.page import HEADS, NAMES, family_cells, summary_cells


def read_budgets(text: str | None, keep: bool) -> tuple[float, ...]:
    """FLOPs cuts from ``0.48,0.64``; none with ``--keep``. Raises InputError for what is no number."""
    check(text is None or not keep, "--budgets", "either --budgets or --keep", "both")
    if keep or text is None:
        return () if keep else BUDGETS
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise InputError(f"--budgets: expected numbers separated by commas, got {text!r}") from error


@contextmanager
def answer_bar() -> Iterator[Progress]:
    """Yield what shows how far an evaluation is."""
    with bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as shown:
        task = shown.add_task("", total=None)

        def tell(doing: str, done: int, total: int) -> None:
            shown.update(task, description=doing)
            if total:
                shown.update(task, completed=done, total=total)

        yield tell


def show(found: Evaluation) -> None:
    """Print the table, the families below it, and where everything is."""
    console, results = Console(), found.results
    console.print(_table(HEADS, [summary_cells(result) for result in results]))
    heads = (*NAMES, *results[0].families)
    console.print(_table(heads, [family_cells(result) for result in results]))
    rate = (
        "nothing left to ask" if found.speed is None else f"{found.speed:.1f} answers/s, everything included"
    )
    batches = f"batches of {found.settings['batch_size']}"
    note = f"{results[0].all.questions} questions, {batches}; {rate}."
    console.print(Text(f"{note}\nreport: {found.page}", style="dim"))


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is the method, one setting a line."""
    out = Table(*heads, show_lines=True)
    for method, *rest in cells:
        out.add_row(*map(Text, (method.replace(":", "\n").replace(",", "\n"), *rest)))
    return out
