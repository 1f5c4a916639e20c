"""Results on the terminal: a rich table where rich is installed, aligned text where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from importlib.util import find_spec

from .rows import Row

HEADS = ("case", "shape", "dtype", "rows", "provider", "mode", "median us", "p20", "p80")
HEADS += ("GB/s", "share of floor", "share of prefill", "note")
WIDTH = 180  # of a table that goes to a file


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    numbers = (row.median_us, row.p20_us, row.p80_us, row.gb_per_s, row.share_of_floor, row.share_of_prefill)
    shown = ["" if n is None else f"{n:,.0f}" if n >= 1000 else f"{n:.3g}" for n in numbers]
    if row.share_of_prefill is not None:
        shown[-1] = f"{100 * row.share_of_prefill:.3g} %"
    scored = str(row.rows) if row.rows else "-"
    where = f"{row.shape} {row.length} -> {row.kept}"
    return (row.case, where, row.dtype, scored, row.provider, row.mode, *shown, row.note)


def show(rows: Sequence[Row], title: str) -> None:
    """Print what was timed or wrong as a table, then who did not run and why."""
    print_table(title, HEADS, [cells(row) for row in rows if row.mode or row.bad], range(6, 12), 4)
    refusals = Counter((row.provider, row.note) for row in rows if not row.mode and not row.bad)
    for (provider, note), times in refusals.items():
        print(f"not run: {provider} ({times} of {sum(r.provider == provider for r in rows)} lines): {note}")


def print_table(
    title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], numbers: Container[int], group: int
) -> None:
    """Lines under their heads: columns ``numbers`` to the right, a rule where the first ``group`` cells change."""
    if find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
        print(title)
        for line in (heads, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i in numbers else "left", overflow="fold")
    for i, line in enumerate(lines):
        group_ends = i + 1 < len(lines) and lines[i + 1][:group] != line[:group]
        table.add_row(*line, end_section=group_ends)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
