"""The ``check`` command: loads a model and compares pruned runs with masked ones."""

from __future__ import annotations

import json
from dataclasses import dataclass

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmprune.cli.load import check_attention, check_depth, load, pick_device, quiet, read_config
from vlmprune.cli.progress import waiting
from vlmprune.policies.recipe import policy_from
from vlmprune.testing.model import check_model
from vlmprune.testing.model_report import HEADS, ModelReport

STYLES = {"ok": "green", "FAILED": "bold red", "unsure": "yellow"}


@dataclass(frozen=True)
class CheckRequest:
    """What was typed; see the options of ``vlmprune check``."""

    model: str
    policy: str | None
    device: str
    dtype: str
    attention: str
    as_json: bool


def execute(request: CheckRequest) -> None:
    """Run the command. Exits with 1 if something differs; raises one of ``vlmprune.errors`` for bad input."""
    quiet()
    policy = None if request.policy is None else policy_from(request.policy)
    config = read_config(request.model)
    check_depth([] if policy is None else [policy], config)
    device = pick_device(request.device)
    check_attention(request.attention, device)
    with waiting(f"loading {request.model}"):
        loaded = load(request.model, config, None, device, request.dtype, request.attention)
    with waiting("comparing pruned with masked runs"):
        report = check_model(loaded.model, policy, strict=False)
    if request.as_json:
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
