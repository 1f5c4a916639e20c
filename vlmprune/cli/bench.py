"""The ``bench`` command: what is measured, a progress bar, and the tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vlmprune.bench import Bench, FullSize, Row, Spent, Spread, by_range, read_profile, run
from vlmprune.checkpoints import Checkpoint
from vlmprune.cli.console import progress_bar, table
from vlmprune.cli.main import open_checkpoint, silence_transformers
from vlmprune.errors import InputError, check

GAINS = {"vision": "vision", "prefill": "prefill", "ttft": "TTFT", "decode": "decode", "total": "answer"}
TIMES = {"vision": "vision", "prefill": "prefill", "selection": "of it selection", "ttft": "TTFT"}
TIMES |= {"decode": "a token", "total": "answer"}
NOTE = """{model} on {device}, {dtype}, {attention} attention; {new_tokens} tokens an answer, {rounds} rounds, medians.
Speed-up: measured, paired round by round with unpruned (20th..80th percentile) | by FLOPs | by the roofline of
{tflops:.3g} TFLOP/s and {gbs:.3g} GB/s, measured in this run. TTFT has all that generate() does before the first token."""


def open_subject(model: str | None, shape: str | None, device: str, dtype: str, attn: str) -> Checkpoint:
    """A checkpoint, or a model of a published size; nothing is read or made yet. Raises InputError for both or none."""
    got = "none" if model is None and shape is None else "both"
    check((model is None) != (shape is None), "model", "either --model or --shape", got)
    if model is not None:
        return open_checkpoint(model, device, dtype, attn)
    assert shape is not None
    silence_transformers()
    return FullSize(shape, device, dtype, attn)


def read_batch(text: str) -> tuple[int, ...]:
    """Batch sizes from ``1,4,16``. Raises InputError for what is no number."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"batch: expected numbers separated by commas, got {text!r}") from error


def execute(
    checkpoint: Checkpoint,
    policies: Sequence[str] | None,
    batch: str,
    images: int | None,
    new_tokens: int,
    rounds: int,
    baselines: bool,
    out: Path | None,
    profile: Path | None,
    as_json: bool,
) -> None:
    """Run the command. Raises one of ``vlmprune.errors`` for bad input, OSError where a file cannot be written."""
    sizes = read_batch(batch)
    with progress_bar() as progress:
        found = run(
            checkpoint,
            policies,
            out,
            batch=sizes,
            images=images,
            new_tokens=new_tokens,
            rounds=rounds,
            baselines=baselines,
            profile=profile,
            progress=progress,
        )
    if as_json:
        print(json.dumps(found.as_dict()))  # noqa: T201
    else:
        show(found)


def show(found: Bench) -> None:
    """Print times and speed-ups of every batch size, what the profile says, how it was measured, and where everything is."""
    console, settings = Console(), found.settings
    for size in settings["batch"]:
        rows = [row for row in found.rows if row.batch == size]
        heads = ("", "visual tokens", *TIMES.values(), "tokens/s", "KV", "peak", "kernels")
        times = table(heads, map(times_cells, rows), title=f"batch {size}", show_lines=True)
        ran = [row for row in rows if row.reason is None]
        gains = table(("times as fast", *GAINS.values()), map(gain_cells, ran), show_lines=True)
        for some in (times, gains):
            some.columns[0].overflow = "fold"  # names of policies have no spaces to break at
            console.print(some)
    if found.profile is not None:
        show_profile(console, found.profile)
    peaks: Mapping[str, float] = settings["peaks"]
    rates = {"tflops": peaks["flops"] / 1e12, "gbs": peaks["bandwidth"] / 1e9}
    lines = [NOTE.format(**settings, **rates)]
    lines += [f"{row.arm}: not run: {row.reason}" for row in found.rows if row.reason is not None]
    lines += [f"{row.arm}: {row.graph}" for row in found.rows if row.graph is not None]
    lines += [] if found.folder is None else [f"results: {found.folder}"]
    lines += [] if found.profile is None else [f"trace: {found.profile} (open it in https://ui.perfetto.dev)"]
    console.print(Text("\n".join(dict.fromkeys(lines)), style="dim"))


def times_cells(row: Row) -> list[str]:
    """What stands in a row of the times."""
    if row.reason is not None:
        return [row.arm, "not run", *["-"] * (len(TIMES) + 4)]
    kept = "".join(f" → {after:g}" for _, _, after in row.stages)
    times = [_time(row.seconds.get(phase)) for phase in TIMES]
    peak = "-" if row.peak_bytes is None else _bytes(row.peak_bytes)
    last = [f"{row.tokens_per_second:.4g}", _bytes(row.kv_bytes), peak]
    return [row.arm, f"{row.visual_tokens:g}{kept}", *times, *last, str(row.kernels or "-")]


def gain_cells(row: Row) -> list[str]:
    """What stands in a row of the speed-ups."""
    return [row.arm, *(_gain(row, phase) for phase in GAINS)]


def show_profile(console: Console, path: Path) -> None:
    """Print where the time of each arm went."""
    rows = read_profile(path)
    ranges = by_range(rows)
    cells = [
        [arm, part, f"{seconds * 1e3:.2f} ms", _longest(rows, arm, part)]
        for arm, parts in ranges.items()
        for part, seconds in parts.items()
    ]
    heads = ("profile", "range", "own time", "longest operations")
    console.print(table(heads, cells))


def _longest(rows: Sequence[Spent], arm: str, part: str) -> str:
    """The three operations of a range that took longest, which come first."""
    some = [row for row in rows if (row.arm, row.range) == (arm, part)]
    total = sum(row.seconds for row in some)
    return ", ".join(f"{row.operation} {row.seconds / total:.0%}" for row in some[:3])


def _gain(row: Row, phase: str) -> str:
    if phase not in row.speedup:
        return "-"
    gain = row.speedup[phase]
    counted = [f"{some[phase]:.2f}" if phase in some else "-" for some in (row.flops, row.roofline)]
    return f"{gain.median:.2f} ({gain.p20:.2f}..{gain.p80:.2f}) | {' | '.join(counted)}"


def _time(seconds: Spread | None) -> str:
    return "-" if seconds is None else f"{seconds.median * 1e3:.4g} ms"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
