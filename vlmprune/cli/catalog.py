"""The ``list`` command: which policies, and of one the schedule on which model; ``listing`` has what it shows."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from vlmprune.cli.options import AsJson, open_checkpoint
from vlmprune.errors import check


def list_command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One policy in full: formula, schedule, settings, how it was checked. NAME[:field=value,...]"
        ),
    ] = None,
    where: Annotated[
        Literal["before", "inside", "both"] | None,
        typer.Option(help="Only those that act before the language model, inside it, or both."),
    ] = None,
    text_aware: Annotated[
        bool | None,
        typer.Option(
            "--text-aware/--no-text-aware", help="Only those that look at the prompt's text, or not."
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Only those that work on models of this type, e.g. qwen2_5_vl.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Only those with a setting for a published budget, e.g. 192 or 0.333: one a line, as typed."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With a name: its schedule on this checkpoint, of which only the configuration is read."
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="With a name: its schedule in so many decoder layers; else 32.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="With a name: visual tokens of an image; else the model's, or 576."),
    ] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of docs/policies.md.")] = False,
) -> None:
    """The pruning policies: what they keep, where they act; of one everything, with its schedule layer by layer."""
    from vlmprune.cli.listing import Filters, show_policies
    from vlmprune.cli.schedule import model_in, model_of

    asked = {"--model": model, "--depth": depth, "--tokens": tokens}
    spare = ", ".join(option for option, value in asked.items() if value is not None)
    check(
        name is not None or not spare, "name", "that of a policy, to show its schedule", f"none, with {spare}"
    )
    if model is None:
        of = model_of(depth, tokens)
    else:
        check(depth is None, "--depth", "either --model or --depth", "both")
        of = model_in(open_checkpoint(model, "cpu", "auto", "sdpa"), tokens)
    show_policies(as_json, markdown, name, Filters(where, text_aware, family, budget), of)
