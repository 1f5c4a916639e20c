"""The commands and their options; the one place where an expected error becomes one line and exit code 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from vlmprune import __version__, env
from vlmprune.cli import accm, tune
from vlmprune.cli.options import (
    AUTO,
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
from vlmprune.errors import BackendError, InputError, ModelError, NotPrunedError, VersionError, first_line

EXPECTED = (InputError, ModelError, NotPrunedError, BackendError, VersionError)
"""What bad input raises. Anything else is our bug and keeps its traceback, unless the operating system refused."""

SHAPE_NAMES = (
    "llava-1.5-7b, llava-1.5-13b, llava-next-7b, qwen2.5-vl-7b-4k, qwen2.5-vl-7b-16k, qwen3-vl-4b, cpu, tiny"
)
"""Those of ``vlmprune.bench.SHAPES``, which knows transformers."""

OPTIONS = {
    "attention": "attn",
    "baselines": "baseline",
    "checkpoint": "model",
    "dpo": "beta",
    "families": "family",
}
ALIKE = (
    "baseline|batch|batch_size|budget|budgets|captioner_lm|captioner_rate|clip|data|device|dtype|epochs|family|images|init|max_new_tokens|model"
    "|new_tokens|oracle|out|profile|prompt|questions|resume|rounds|seeds|selector_rate|shape|text_encoder|train_mapper"
)
"""Arguments of the library that are called otherwise on the command line, and those that are not."""
ARGUMENT = re.compile(rf"\b(?:{'|'.join(OPTIONS)}|{ALIKE})(?=: expected)|(?<=one per )image(?=,)")


class Commands(TyperGroup):
    """All commands, with an expected error of any of them turned into ``error: ...`` on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except (*EXPECTED, OSError) as error:
            # A full disk or a missing right has a number; an OSError without one was made up by some library. A reader
            # of our output who has gone is no error.
            ours = isinstance(error, OSError) and (error.errno is None or isinstance(error, BrokenPipeError))
            if env.TRACEBACKS or ours:
                raise
            # A BackendError lists one reason a line.
            reasons = isinstance(error, BackendError)
            text = "; ".join(map(str.strip, str(error).splitlines())) if reasons else first_line(error)
            if isinstance(error, InputError):
                text = ARGUMENT.sub(lambda m: "--" + OPTIONS.get(m[0], m[0].replace("_", "-")), text)
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(accm.app, name="accm")
app.command()(tune.tune)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="vlmprune")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmprune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Visual-token pruning for vision-language models."""


@app.command()
def run(
    model: Model,
    image: Annotated[list[Path], typer.Option(help="Image file; repeatable.")],
    prompt: Annotated[
        str, typer.Option(help="Question. With the image placeholder token in it, it is taken literally.")
    ],
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
    checkpoint = open_checkpoint(model, device, dtype, attn)
    from vlmprune.cli.run import execute

    execute(checkpoint, image, prompt, policy or (), max_new_tokens, repeat, compare, save, as_json)


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
        Precision, typer.Option(help="auto = as stored; of a shape bfloat16 on a GPU, else float32.")
    ] = "auto",
    attn: Attention = "sdpa",
    as_json: AsJson = False,
) -> None:
    """Speed of the unpruned model and each policy, phase by phase, beside what FLOPs and roofline say."""
    from vlmprune.cli.bench import execute, open_subject

    checkpoint = open_subject(model, shape, device, dtype, attn)
    execute(checkpoint, policy, batch, images, new_tokens, rounds, baselines, out, profile, as_json)


@app.command("check")
def check_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id of a supported model.")],
    policy: Annotated[
        str | None, typer.Option(help=f"{POLICY}; without one, three that test the wiring.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[Precision, typer.Option(help=f"{AUTO} float32 shows the smallest faults.")] = "auto",
    attn: Attention = "sdpa",
    as_json: AsJson = False,
) -> None:
    """Whether pruned runs give what the masked model gives: on this machine, with these versions. Exit code 1 if not."""
    checkpoint = open_checkpoint(model, device, dtype, attn)
    from vlmprune.cli.check import execute

    execute(checkpoint, policy, as_json)


@app.command("list")
def list_command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One policy in full: schedule, settings, how it was checked. NAME[:field=value,...]"
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
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The README's table.")] = False,
) -> None:
    """The pruning policies, their fields with defaults, and where they come from."""
    from vlmprune.cli.listing import Filters, show_policies

    show_policies(as_json, markdown, name, Filters(where, text_aware, family, budget))


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, devices, and which backend each op would use here and why the others not."""
    from vlmprune.cli.info import show_info

    show_info(as_json)
