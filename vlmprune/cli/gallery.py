"""The ``gallery`` command: every method drawn at the same budgets, and where the pictures are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vlmprune.checkpoints import Checkpoint
from vlmprune.cli.console import progress_bar, table
from vlmprune.errors import InputError
from vlmprune.view.gallery import BUDGETS, NAME, SHEET, make_gallery


def read_tokens(typed: str | None) -> tuple[float, ...]:
    """Budgets as typed, "192,128,64". Raises InputError for anything but numbers."""
    if typed is None:
        return BUDGETS
    try:
        return tuple(float(part) for part in typed.split(","))
    except ValueError as error:
        raise InputError(
            f"budgets: expected numbers of visual tokens, e.g. 192,128,64, got {typed!r}"
        ) from error


def execute(
    checkpoint: Checkpoint,
    questions: Path,
    out: Path,
    methods: Sequence[str],
    budgets: Sequence[float],
    max_new_tokens: int,
) -> None:
    """Draw, then say how many answers of each method were right. Raises what ``make_gallery`` raises."""
    with progress_bar() as progress:
        left_out = make_gallery(
            checkpoint, questions, out, budgets, methods, max_new_tokens=max_new_tokens, progress=progress
        )
    found = json.loads((out / NAME).read_text())
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
    lines = [f"left out: {name}: {why}" for name, why in left_out.items()]
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
