"""The ``check`` command: loads a model and compares pruned runs with masked ones."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmprune.checkpoints import Checkpoint
from vlmprune.cli.progress import waiting
from vlmprune.policies.recipe import policy_from
from vlmprune.testing.model import check_model
from vlmprune.testing.model_report import HEADS, ModelReport

STYLES = {"ok": "green", "FAILED": "bold red", "unsure": "yellow"}


def execute(checkpoint: Checkpoint, typed: str | None, as_json: bool) -> None:
    """Run the command. Exits with 1 if something differs; raises one of ``vlmprune.errors`` for bad input."""
    policy = None if typed is None else policy_from(typed)
    checkpoint.check_depth([] if policy is None else [policy])
    with waiting(f"loading {checkpoint.source}"):
        model = checkpoint.model
    with waiting("comparing pruned with masked runs"):
        report = check_model(model, policy, strict=False)
    if as_json:
        print(json.dumps(report.as_dict()))  # noqa: T201
    else:
        _show(report)
    if not report.ok:
        raise typer.Exit(1)


def _show(report: ModelReport) -> None:
    """One line a comparison, those that failed in red."""
    table = Table(*HEADS, box=None, pad_edge=False)
    for verdict, *cells in report.cells():
        row = [Text(verdict, style=STYLES[verdict]), *map(Text, cells)]
        table.add_row(*row, style=STYLES[verdict] if verdict != "ok" else "")
    console = Console()
    console.print(Text(report.setting))
    console.print(table)
    console.print(Text(report.summary, style=STYLES[report.summary.partition(":")[0]]))
