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
from vlmprune.cli.options import open_checkpoint, read_numbers, silence_transformers
from vlmprune.errors import check

GAINS = {"vision": "vision", "prefill": "prefill", "ttft": "TTFT", "decode": "a token", "total": "answer"}
TIMES = {"vision": "vision", "prefill": "prefill", "selection": "selects", "ttft": "TTFT"}
TIMES |= {"decode": "a token", "total": "answer"}
NOTE = """\
{model} on {device}, {dtype}, {attention} attention; {new_tokens} tokens an answer, {rounds} rounds, medians in ms. \
"selects" is part of prefill. Speed-ups are paired round by round with unpruned. The roofline is of {tflops:.3g} TFLOP/s and \
{gbs:.3g} GB/s, measured in this run. TTFT has all that generate() does before the first token."""


def open_subject(model: str | None, shape: str | None, device: str, dtype: str, attn: str) -> Checkpoint:
    """A checkpoint, or a model of a published size; nothing is read or made yet. Raises InputError for both or none."""
    got = "none" if model is None and shape is None else "both"
    check((model is None) != (shape is None), "model", "either --model or --shape", got)
    if model is not None:
        return open_checkpoint(model, device, dtype, attn)
    assert shape is not None
    silence_transformers()
    return FullSize(shape, device, dtype, attn)


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
    sizes = read_numbers(batch, int, "batch")
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
    """Print the arms, times and speed-ups of every batch size, what the profile says, and how it was measured."""
    console, settings = Console(), found.settings
    numbers = {row.arm: str(i) for i, row in enumerate(found.rows[: len({row.arm for row in found.rows})])}
    for size in settings["batch"]:
        rows = [row for row in found.rows if row.batch == size]
        ran = [row for row in rows if row.reason is None]
        arms = [(numbers[row.arm], row.arm, _told(row)) for row in rows]
        console.print(table(("", "arm", "visual tokens"), arms, title=f"batch {size}"))
        times = [(numbers[row.arm], *(_ms(row.seconds.get(phase)) for phase in TIMES)) for row in ran]
        console.print(table(("ms", *TIMES.values()), times))
        memory = [(numbers[row.arm], *memory_cells(row)) for row in ran]
        console.print(table(("", "tokens/s", "KV", "peak memory", "kernels"), memory))
        gains = [(numbers[row.arm], *cells) for row in ran[1:] for cells in gain_cells(row)]
        console.print(table(("", "times as fast", "measured", "p20..p80", "by FLOPs", "roofline"), gains))
    if found.profile is not None:
        show_profile(console, found.profile)
    peaks: Mapping[str, float] = settings["peaks"]
    lines = [NOTE.format(**settings, tflops=peaks["flops"] / 1e12, gbs=peaks["bandwidth"] / 1e9)]
    lines += [] if found.folder is None else [f"results: {found.folder}"]
    lines += [] if found.profile is None else [f"trace: {found.profile} (open it in https://ui.perfetto.dev)"]
    console.print(Text("\n".join(lines), style="dim"))


def _told(row: Row) -> str:
    """The tokens an arm keeps, and how graphs fared; or why it did not run."""
    if row.reason is not None:
        return f"not run: {row.reason}"
    kept = "".join(f" → {after:g}" for _, _, after in row.stages)
    return f"{row.visual_tokens:g}{kept}" + ("" if row.graph is None else f" ({row.graph})")


def memory_cells(row: Row) -> list[str]:
    """Throughput and memory of an arm."""
    peak = "-" if row.peak_bytes is None else _bytes(row.peak_bytes)
    return [f"{row.tokens_per_second:.4g}", _bytes(row.kv_bytes), peak, str(row.kernels or "-")]


def gain_cells(row: Row) -> list[list[str]]:
    """A line for each phase that was seen: what it gained, and what FLOPs and roofline say."""
    lines = []
    for phase, name in GAINS.items():
        if phase in row.speedup:
            gain = row.speedup[phase]
            counted = [f"{some[phase]:.2f}" if phase in some else "-" for some in (row.flops, row.roofline)]
            lines.append([name, f"{gain.median:.2f}", f"{gain.p20:.2f}..{gain.p80:.2f}", *counted])
    return lines


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


def _ms(seconds: Spread | None) -> str:
    return "-" if seconds is None else f"{seconds.median * 1e3:.4g}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
