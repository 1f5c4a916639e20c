"""The ``check`` command: loads a model and compares pruned runs with masked ones."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.text import Text

from vlmprune.checkpoints import Checkpoint
from vlmprune.cli.console import progress_bar
from vlmprune.policies.recipe import policy_from
from vlmprune.testing.model import check_model

STYLES = {"ok": "green", "FAILED": "bold red", "unsure": "yellow"}


def execute(checkpoint: Checkpoint, typed: str | None, as_json: bool) -> None:
    """Run the command. Exits with 1 if something differs; raises one of ``vlmprune.errors`` for bad input."""
    policy = None if typed is None else policy_from(typed)
    checkpoint.check_depth([] if policy is None else [policy])
    with progress_bar(f"loading {checkpoint.source}") as tell:
        model = checkpoint.model
        tell("comparing pruned with masked runs", 0, 0)
        report = check_model(model, policy, strict=False)
    if as_json:
        print(json.dumps(report.as_dict() | {"precision": checkpoint.precision}))  # noqa: T201
    else:
        console = Console()
        for line in str(report).splitlines():
            console.print(Text(line, style=STYLES.get(line.split()[0].rstrip(":"), "")))
        if checkpoint.stored is not None:
            console.print(Text(f"dtype: {checkpoint.precision}", style="dim"))
    if not report.ok:
        raise typer.Exit(1)
