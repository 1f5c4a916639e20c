"""The ``gallery`` command: every method drawn at the same budgets, and where the pictures are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vlmprune.checkpoints import Checkpoint
from vlmprune.cli.console import progress_bar, table
from vlmprune.cli.options import read_numbers
from vlmprune.view.gallery import BUDGETS, NAME, SHEET, make_gallery


def execute(
    checkpoint: Checkpoint,
    questions: Path,
    out: Path,
    methods: Sequence[str],
    typed: str | None,
    max_new_tokens: int,
) -> None:
    """Draw, then say how many answers of each method were right. Raises what ``make_gallery`` raises."""
    budgets = BUDGETS if typed is None else read_numbers(typed, float, "budgets")
    with progress_bar() as progress:
        found = make_gallery(
            checkpoint, questions, out, budgets, methods, max_new_tokens=max_new_tokens, progress=progress
        )
    console = Console()
    heads = ("method", *(f"{budget:g}" for budget in budgets))
    asked = len(found["questions"])
    console.print(
        table(
            heads,
            _rows(found, budgets),
            title=f"right answers of {asked}, by visual tokens (mean over layers)",
        )
    )
    lines = [f"left out: {one['method']}: {one['why']}" for one in found["left_out"]]
    lines += ["* layers ahead of its first stage alone cost more than this budget"]
    lines += [f"pictures: {out / SHEET}, and one a method beside it; answers: {out / NAME}"]
    console.print(Text("\n".join(lines), style="dim"))


def _rows(found: Mapping[str, Any], budgets: Sequence[float]) -> list[tuple[str, ...]]:
    """Of each method how many of its answers are right at each budget."""
    right: dict[tuple[str, float | None], list[bool]] = defaultdict(list)
    over = set()
    for answer in found["answers"]:
        key = answer["method"], answer["budget"]
        right[key].append(answer["right"])
        if not answer["meets"]:
            over.add(key)
    rows = [("unpruned", *[f"{sum(right['', None])}"] * len(budgets))]
    for name in dict.fromkeys(name for name, _ in right if name):
        cells = (f"{sum(right[name, budget])}{'*' * ((name, budget) in over)}" for budget in budgets)
        rows.append((name, *cells))
    return rows
