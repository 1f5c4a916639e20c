"""The ``tune`` command: a profile of the layers, or a search at a budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from vlmprune.cli.console import OPEN, progress_bar, table
from vlmprune.cli.options import Attention, Device, Dtype, MaxNewTokens, Model, Policies, open_checkpoint
from vlmprune.errors import check

if TYPE_CHECKING:
    from vlmprune.checkpoints import Checkpoint
    from vlmprune.tuning import Found, Profile

SHOWN = 12


Questions = Annotated[Path, typer.Option(help="Folder with a questions.jsonl and its images.")]
Out = Annotated[Path, typer.Option(help="Folder for results; a killed search goes on from there.")]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Share of the prefill FLOPs to save, e.g. 0.8. Without one: at which layer attention depends on the "
        "question, for which questions need no answers."
    ),
]
Families = Annotated[list[str] | None, typer.Option(help="Only these families of questions; repeatable.")]
First = Annotated[int, typer.Option(min=1, help="Questions of the first rung.")]
OneIn = Annotated[int, typer.Option(min=2, help="2 = the better half goes on, 3 = the best third.")]
Images = Annotated[int, typer.Option(min=2, help="Images of the profile, and questions about each.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the order of the questions, and what is drawn.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions asked at once.")]
SEARCHES = ("policy", "first", "one_in", "batch_size", "max_new_tokens")
"""What only a search reads."""


def tune(
    context: typer.Context,
    model: Model,
    questions: Questions,
    out: Out,
    budget: Budget = None,
    policy: Policies = None,
    family: Families = None,
    first: First = 16,
    one_in: OneIn = 2,
    images: Images = 8,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attention = "sdpa",
) -> None:
    """Find a layer to prune at, or with --budget the policy that answers best at equal FLOPs, from sweeps such as
    --policy "feather:layers=2/{4,5,6}".
    """
    _check_read(context, budget)
    where = open_checkpoint(model, device, dtype, attn), questions, out
    if budget is None:
        _profile(*where, family or (), images, seed)
        return
    from vlmprune.tuning import search

    with progress_bar() as progress:
        found = search(
            *where,
            policy or (),
            budget=budget,
            families=family or (),
            first=first,
            one_in=one_in,
            seed=seed,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    _show_search(found)


def _check_read(context: typer.Context, budget: float | None) -> None:
    """Raise InputError for an option that nothing would read."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    typed = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    searches = ", ".join(f"--{name.replace('_', '-')}" for name in typed if name in SEARCHES)
    expected = "a share of the FLOPs, to search policies at"
    check(budget is not None or not searches, "budget", expected, f"none, with {searches}")
    check(budget is None or "images" not in typed, "images", "only without --budget, for a profile", "both")


def _profile(
    checkpoint: Checkpoint, questions: Path, out: Path, families: Sequence[str], images: int, seed: int
) -> None:
    from vlmprune.eval.plots import check_matplotlib
    from vlmprune.eval.store import check_out, write
    from vlmprune.tuning import draw_profile, profile_layers

    check_matplotlib("vlmprune tune")
    check_out(out)
    with progress_bar() as progress:
        profile = profile_layers(
            checkpoint, questions, families=families, images=images, seed=seed, progress=progress
        )
    out.mkdir(exist_ok=True)
    write(out / "profile.json", json.dumps(profile.as_dict(), indent=1).encode())
    write(out / "profile.png", draw_profile(profile))
    _show_profile(profile, out)


def _show_profile(profile: Profile, out: Path) -> None:
    from vlmprune.eval.page import percent

    console = Console()
    rows = ((f"{row.layer}", percent(row.seeks), percent(row.moves)) for row in profile.layers)
    console.print(table(("layer", "seeks", "moves"), rows))
    layer = profile.recommended
    said = "no layer: attention hardly depends on question and image" if layer is None else f"layer={layer}"
    console.print(Text(f"first stage that can know what is asked: {said}", style="bold"))
    note = f"{profile.images} questions about each of {profile.images} images; plot and figures: {out}"
    console.print(Text(note, style="dim"))


def _show_search(found: Found) -> None:
    from vlmprune.cli.eval import one_setting_a_line
    from vlmprune.eval.page import percent, points

    console = Console()
    ended = {one.method: (rung.questions, one) for rung in found.rungs for one in rung.standings}
    order = sorted(ended.values(), key=lambda pair: (-pair[0], -pair[1].right.mean))  # stable: best first
    rows = [
        one_setting_a_line(
            (one.method, f"{asked}", f"{one.cut:.1%}", percent(one.right), points(one.to_best))
        )
        for asked, one in order[:SHOWN]
    ]
    heads = ("method", "questions", "FLOPs cut", "right", "to the best of its rung")
    console.print(table(heads, rows, **OPEN))
    last, more = found.rungs[-1], len(order) - len(rows)
    rungs = ", ".join(f"{len(rung.standings)} on {rung.questions} questions" for rung in found.rungs)
    for text, why in found.left_out.items():
        console.print(Text(f"left out: {text}: {why}", style="dim"))
    level = [one.method for one in found.level]
    apart = f"not told apart from it: {', '.join(level)}" if level else "clear of all others in the last rung"
    console.print(Text(f"best: {last.standings[0].method}", style="bold"))
    console.print(
        Text(
            f"{apart}\nunpruned: {percent(last.unpruned)}; rungs: {rungs}; {more} more in the plot\n"
            f"policy file: {found.file}",
            style="dim",
        )
    )
