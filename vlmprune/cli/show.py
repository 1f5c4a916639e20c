"""Results as a table for people, or as one JSON object for programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmprune import __version__
from vlmprune.cli.generate import Outcome, Request

SETTINGS = re.compile(r":([^()+&|]*[^()+&|\s])")
"""What stands behind the names of policies as typed, alone or joined."""


def show(request: Request, outcomes: list[Outcome]) -> None:
    """Print the table and how it was measured."""
    console = Console()
    console.print(table(outcomes))
    console.print(Text(footer(request), style="dim"))


def table(outcomes: list[Outcome]) -> Table:
    """One row per quantity, one column per run."""
    out = Table(show_lines=False)
    out.add_column("", no_wrap=True)
    for outcome in outcomes:
        out.add_column(Text(SETTINGS.sub("", outcome.label)), overflow="fold")
    for section in SECTIONS:
        for name, cell in section:
            out.add_row(name, *(Text(cell(outcome)) for outcome in outcomes))
        out.add_section()
    return out


def footer(request: Request) -> str:
    """How the numbers came about."""
    checkpoint = request.checkpoint
    where = f"{checkpoint.device}, {checkpoint.dtype}, {checkpoint.attention} attention"
    lines = [
        f"{checkpoint.source} on {where}. Greedy, batch 1.",
        f"Time: median of {request.repeat} after one untimed warm-up run of the same policy; prefill includes selection.",
        "FLOPs are 2 x multiply-adds, counted from shapes, of the decoder's prefill.",
    ]
    if request.save is not None:
        lines.append(f"picture: {request.save}")
    return "\n".join(lines)


def as_json(request: Request, outcomes: list[Outcome]) -> dict[str, Any]:
    """Everything the table says, and which tokens survived each stage."""
    checkpoint = request.checkpoint
    return {
        "version": __version__,
        "model": checkpoint.source,
        "images": [str(path) for path in request.images],
        "prompt": request.prompt,
        "max_new_tokens": request.max_new_tokens,
        "device": checkpoint.device,
        "dtype": checkpoint.dtype,
        "attention": checkpoint.attention,
        "warm_up_runs": 1,
        "timed_runs": request.repeat,
        "picture": None if request.save is None else str(request.save),
        "runs": [
            {
                "policy": outcome.policy,
                "settings": outcome.settings,
                "answer": outcome.answer,
                "kept": [list(kept) for kept in outcome.kept],
                "report": outcome.report.as_dict(),
            }
            for outcome in outcomes
        ],
    }


def _stages(outcome: Outcome) -> str:
    stages = outcome.report.stages
    return "\n".join(f"layer {layer}: {before}→{after}" for layer, before, after in stages) or "-"


def _flops(count: int, like: int) -> str:
    """``count`` in the unit that suits ``like``, so that numbers to be compared share one."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if like >= size:
            return f"{count / size:.2f} {unit}FLOP"
    return f"{count} FLOP"


def _bytes(count: int) -> str:
    """KV-cache memory, text and whole batch included."""
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _decode(outcome: Outcome) -> str:
    report = outcome.report
    return f"{_time(report.seconds.decode)} ({report.decode_steps})" if report.decode_steps else "-"


def _per_token(outcome: Outcome) -> str:
    report = outcome.report
    return _time(report.seconds.decode / report.decode_steps) if report.decode_steps else "-"


SECTIONS: tuple[tuple[tuple[str, Callable[[Outcome], str]], ...], ...] = (
    (("settings", lambda o: "\n\n".join(SETTINGS.findall(o.label)).replace(",", "\n") or "-"),),
    (("answer", lambda o: o.answer),),
    (
        ("visual tokens", lambda o: f"{o.report.visual_tokens:g}"),
        ("stages", _stages),
        ("mean over layers", lambda o: f"{o.report.tokens.mean_per_layer:.1f}"),
        ("after last stage", lambda o: f"{o.report.tokens.after_last_stage:g}"),
        ("resident in KV", lambda o: f"{o.report.tokens.resident_kv:.1f}"),
        ("KV cache", lambda o: _bytes(o.report.kv_bytes)),
    ),
    (
        ("FLOPs, full", lambda o: _flops(o.report.flops.full, o.report.flops.full)),
        ("FLOPs, this run", lambda o: _flops(o.report.flops.pruned, o.report.flops.full)),
        ("FLOPs cut", lambda o: f"{o.report.flops.cut:.1%}"),
        ("FLOPs, vision", lambda o: _flops(o.report.flops.vision, o.report.flops.full)),
    ),
    (
        ("vision", lambda o: _time(o.report.seconds.vision)),
        ("prefill", lambda o: _time(o.report.seconds.prefill)),
        ("selection", lambda o: _time(o.report.seconds.selection) if o.kept else "-"),
        ("decode (steps)", _decode),
        ("decode per token", _per_token),
    ),
)
