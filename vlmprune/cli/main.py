"""The commands and their options; ``errors`` says what becomes of those that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmprune import __version__
from vlmprune.cli import accm, catalog, logs, tune
from vlmprune.cli.errors import Commands
from vlmprune.cli.options import (
    AUTO,
    DTYPES,
    POLICY,
    AsJson,
    Attention,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    Policies,
    Precision,
    open_checkpoint,
)

SHAPE_NAMES = (
    "llava-1.5-7b, llava-1.5-13b, llava-next-7b, qwen2.5-vl-7b-4k, qwen2.5-vl-7b-16k, qwen3-vl-4b, cpu, tiny"
)
"""Those of ``vlmprune.bench.SHAPES``, which knows transformers."""

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="vlmprune")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmprune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say on stderr what is loaded, and on what it runs.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Visual-token pruning for vision-language models."""
    if verbose:
        context.with_resource(logs.shown())


@app.command()
def run(
    model: Model,
    prompt: Annotated[
        str, typer.Option(help="Question. With the image placeholder token in it, it is taken literally.")
    ],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; repeatable.")] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="A clip instead: an animation (GIF, WebP, PNG) or a folder of frames."),
    ] = None,
    policy: Policies = None,
    max_new_tokens: MaxNewTokens = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each policy; the median is shown.")] = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attention = "sdpa",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run unpruned, as the first column.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write a picture: the image with the dropped patches dimmed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question with each policy, and show what was kept and what it saved."""
    # Before transformers is imported, which takes seconds: a wrong file or policy is told at once.
    from vlmprune.cli.pictures import read_pictures

    shown = read_pictures(image or (), video)
    from vlmprune.policies.recipe import policy_from

    policies = [(text, policy_from(text)) for text in policy or ()]
    checkpoint = open_checkpoint(model, device, dtype, attn)
    from vlmprune.cli.run import execute

    execute(checkpoint, shown, prompt, policies, max_new_tokens, repeat, compare, save, as_json)


@app.command("eval")
def eval_command(
    model: Model,
    questions: Annotated[Path, typer.Option(help="Folder with a questions.jsonl and its images.")],
    out: Annotated[Path, typer.Option(help="Folder for results; a killed run goes on from there.")],
    policy: Policies = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Shares of the prefill FLOPs to save, e.g. 0.48,0.64 (the default)."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="No budgets: policies keep what they say.")] = False,
    family: Annotated[
        list[str] | None, typer.Option(help="Only these families of questions; repeatable.")
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines/--no-baselines",
            help="Also uniform tokens (lattice and raster), random ones, and a smaller picture.",
        ),
    ] = True,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Only this of lattice, raster, random and smaller; repeatable."),
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also an oracle that is told where the answer is seen (box).")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of each policy that draws.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions asked at once.")] = 16,
    max_new_tokens: MaxNewTokens = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attention = "sdpa",
) -> None:
    """Accuracy of policies at equal FLOPs on a set of questions: table, plots and a report."""
    checkpoint = open_checkpoint(model, device, dtype, attn)
    from vlmprune.cli.console import progress_bar
    from vlmprune.cli.eval import read_baselines, read_budgets, show
    from vlmprune.eval import run as evaluate

    with progress_bar() as progress:
        found = evaluate(
            checkpoint,
            questions,
            out,
            policy or (),
            budgets=read_budgets(budgets, keep),
            families=family or (),
            baselines=read_baselines(baselines, baseline or ()),
            oracle=oracle,
            seeds=seeds,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    show(found)


@app.command()
def bench(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; or --shape.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"Random weights of a size: {SHAPE_NAMES}.")] = None,
    policy: Policies = None,
    batch: Annotated[str, typer.Option(help="Prompts at once, e.g. 1,4,16.")] = "1",
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of a prompt, in place of the shape's.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of every answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Timed answers of each; all take turns.")] = 5,
    baselines: Annotated[
        bool,
        typer.Option("--baselines/--no-baselines", help="Also a smaller image and the published style."),
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, results.csv and plots.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="File for a trace of torch's profiler (.json or .json.gz).")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        Precision,
        typer.Option(
            metavar="<dtype>",
            help=f"{DTYPES} auto = as stored; of a shape bfloat16 on a GPU, else float32.",
        ),
    ] = "auto",
    attn: Attention = "sdpa",
    as_json: AsJson = False,
) -> None:
    """Speed of the unpruned model and each policy, phase by phase, beside what FLOPs and roofline say."""
    from vlmprune.cli.bench import execute, open_subject

    checkpoint = open_subject(model, shape, device, dtype, attn)
    execute(checkpoint, policy, batch, images, new_tokens, rounds, baselines, out, profile, as_json)


@app.command("gallery")
def gallery_command(
    model: Model,
    questions: Annotated[
        Path, typer.Option(help="Folder with a questions.jsonl and its images; all are asked.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and gallery.json.")],
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; repeatable. See `vlmprune list`.")
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Visual tokens of an image, mean over the layers: 192,128,64 (the default)."),
    ] = None,
    max_new_tokens: MaxNewTokens = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attention = "sdpa",
) -> None:
    """Draw what every method keeps at the same budgets, and whether it answers right."""
    checkpoint = open_checkpoint(model, device, dtype, attn)
    from vlmprune.cli.gallery import execute

    execute(checkpoint, questions, out, method or (), budgets, max_new_tokens)


@app.command("show")
def show_command(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoint folder or hub id to choose; repeatable. None = the one in examples/."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Visitors may name other checkpoints, to be loaded here.")
    ] = False,
    max_new_tokens: MaxNewTokens = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """A page in the browser: put in a picture, ask, and see side by side what each method drops and answers."""
    from vlmprune.cli.web import execute

    execute(model or (), host, port, device, dtype, max_new_tokens, any_model)


@app.command("check")
def check_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id of a supported model.")],
    policy: Annotated[
        str | None, typer.Option(help=f"{POLICY}; without one, three that test the wiring.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        Precision, typer.Option(metavar="<dtype>", help=f"{DTYPES} {AUTO} float32 shows the smallest faults.")
    ] = "auto",
    attn: Attention = "sdpa",
    as_json: AsJson = False,
) -> None:
    """Whether pruned runs give what the masked model gives: on this machine, with these versions. Exit code 1 if not."""
    checkpoint = open_checkpoint(model, device, dtype, attn)
    from vlmprune.cli.check import execute

    execute(checkpoint, policy, as_json)


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, devices, and which backend each op would use here and why the others not."""
    from vlmprune.cli.info import show_info

    show_info(as_json)


app.command("list")(catalog.list_command)
app.command()(tune.tune)
app.add_typer(accm.app, name="accm")
