"""The ``accm`` commands: ``train``, for captioner and selector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlmprune.cli.options import POLICY, Attention, Device, Dtype, Model, open_checkpoint

if TYPE_CHECKING:
    from vlmprune.training import Trained

WORDING = "additional information: {}\n"
"""That of ``vlmprune.policies.methods.accm``, which knows torch: ``--help`` must not wait for that."""

app = typer.Typer(no_args_is_help=True, help="ACCM: words for what pruning loses.")


@app.command()
def train(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL of image, question (or prompt), answer; or a folder with a questions.jsonl."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run, new or, with --resume, to go on with.")],
    init: Annotated[
        Path | None, typer.Option(help="Describer to start from: a folder with captioner and selector.")
    ] = None,
    captioner_lm: Annotated[
        str | None,
        typer.Option(help="Or a new one: the captioner's causal language model, a folder or hub id ..."),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="... and the selector's text encoder; without one there is no selector."),
    ] = None,
    selection: Annotated[
        str, typer.Option(help=f"What drops tokens, before the language model: {POLICY}.")
    ] = "fastervlm",
    keep: Annotated[str, typer.Option(help="Visual tokens per image that stay, or a share (0.1).")] = "36",
    wording: Annotated[str, typer.Option(help="What joins the prompt, {} for the caption.")] = WORDING,
    candidates: Annotated[int, typer.Option(min=2, help="Captions written and compared.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a step.")] = 4,
    epochs: Annotated[float, typer.Option(help="How often every question comes.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps, in place of epochs.")] = None,
    captioner_rate: Annotated[float, typer.Option(help="Learning rate of the captioner.")] = 1e-6,
    selector_rate: Annotated[float, typer.Option(help="Learning rate of the selector.")] = 2e-5,
    warm_up: Annotated[
        int | None, typer.Option(min=0, help="Steps of the warm-up; else 1000, or a tenth of the run.")
    ] = None,
    clip: Annotated[float, typer.Option(help="Norm at which gradients are cut off.")] = 1.0,
    weighting: Annotated[
        Literal["batch", "sample"],
        typer.Option(help="One advantage for a batch, as published, or each its own."),
    ] = "batch",
    train_mapper: Annotated[
        bool, typer.Option("--train-mapper/--freeze-mapper", help="The captioner's mapper.")
    ] = False,
    train_encoder: Annotated[
        bool | None,
        typer.Option(
            "--train-encoder/--freeze-encoder", help="The selector's text encoder; else as it was saved."
        ),
    ] = None,
    dpo: Annotated[
        bool,
        typer.Option("--dpo", help="Direct Preference Optimization, best against worst, of the captioner."),
    ] = False,
    beta: Annotated[float, typer.Option(help="How strongly DPO holds on to the start.")] = 0.1,
    imitate: Annotated[
        bool,
        typer.Option(
            "--imitate", help="Lines have a caption, which the captioner learns: how a new one starts."
        ),
    ] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw the candidates, where beams are too alike.")
    ] = False,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut off there.")] = 64,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Prompts at most in one call, for memory; else all of a step.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the data's order, dropout and draws.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    save_steps: Annotated[int | None, typer.Option(min=1, help="Save every so many steps, too.")] = None,
    save_seconds: Annotated[float, typer.Option(min=0, help="Save every so many seconds.")] = 120.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attention = "sdpa",
) -> None:
    """Train captioner and selector on what the frozen model makes of their words. Killed, it goes on with --resume."""
    checkpoint = open_checkpoint(model, device, dtype, attn)
    from vlmprune.cli.console import progress_bar
    from vlmprune.training import Plan, Start
    from vlmprune.training import train as run

    plan = Plan(
        selection=selection,
        keep=_budget(keep),
        wording=wording,
        candidates=candidates,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        captioner_rate=captioner_rate,
        selector_rate=selector_rate,
        warm_up=warm_up,
        clip=clip,
        weighting=weighting,
        train_mapper=train_mapper,
        train_encoder=train_encoder,
        dpo=beta if dpo else None,
        imitate=imitate,
        sample=sample,
        max_answer_tokens=max_answer_tokens,
        rows=rows,
        seed=seed,
    )
    start = Start(None if init is None else str(init), captioner_lm, text_encoder)
    with progress_bar() as progress:
        found = run(
            checkpoint,
            data,
            out,
            plan,
            start,
            resume=resume,
            save_steps=save_steps,
            save_seconds=save_seconds,
            progress=progress,
        )
    _show(found)


def _budget(text: str) -> int | float:
    """``36`` tokens, or ``0.1`` of them. Raises InputError for what is no number."""
    from vlmprune.errors import InputError

    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise InputError(f"keep: expected a number of tokens or a share, got {text!r}") from error


def _show(found: Trained) -> None:
    """Two lines: how well, and where it is."""
    from vlmprune.training.run import spell

    typer.echo(f"{found.steps} steps, {found.seconds:.0f} s; last of them: {spell(found.figures)}")
    typer.echo(f"compensator: {found.compensator}")
