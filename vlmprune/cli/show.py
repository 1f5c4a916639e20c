"""Results of ``run`` as a table for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmprune.models import Report
from vlmprune.view.outcome import Outcome
from vlmprune.view.units import duration, flops

SETTINGS = re.compile(r"(?::|(?<=\)),)([^()+&|]*[^()+&|\s])")
"""What stands behind the names of policies as typed, alone or joined."""


def show(settings: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Print one column per run, one row per quantity that any of them has; below, how all was measured."""
    out = Table("")
    for outcome in outcomes:
        out.add_column(Text(SETTINGS.sub("", outcome.label)), overflow="fold")
    out.columns[0].no_wrap = True
    for sections in zip(*map(cells, outcomes), strict=True):
        for name in sections[0]:
            found = [section[name] for section in sections]
            if set(found) != {"-"}:
                out.add_row(name, *map(Text, found))
        out.add_section()
    lines = [
        "{model} on {device}, {precision}, {attention} attention. Greedy, batch 1.",
        "Time: median of {timed_runs} after one untimed warm-up run of the same policy; prefill includes selection.",
        "FLOPs are 2 x multiply-adds, counted from shapes, of the decoder's prefill.",
        *(["picture: {picture}"] if settings["picture"] else []),
    ]
    console = Console()
    console.print(out)
    console.print(Text("\n".join(lines).format_map(settings), style="dim"))


def cells(outcome: Outcome) -> list[dict[str, str]]:
    """What stands in a run's column, section by section."""
    report = outcome.report
    tokens, cost, seconds, steps = report.tokens, report.flops, report.seconds, report.decode_steps
    stages = (f"layer {layer}: {before}→{after}" for layer, before, after in report.stages)
    captions = [text for sample in report.captions for text in sample]
    return [
        {"settings": "\n\n".join(SETTINGS.findall(outcome.label)).replace(",", "\n") or "-"},
        {"answer": outcome.answer, "captions": "\n".join(captions) or "-"},
        {
            "visual tokens": f"{report.visual_tokens:g}",
            "stages": "\n".join(stages) or "-",
            "mean over layers": f"{tokens.mean_per_layer:.1f}",
            "after last stage": f"{tokens.after_last_stage:g}",
            "resident in KV": f"{tokens.resident_kv:.1f}",
            "KV cache": _bytes(report.kv_bytes),
        },
        {
            "FLOPs, full": flops(cost.full, cost.full),
            "FLOPs, this run": flops(cost.pruned, cost.full),
            "FLOPs cut": f"{cost.cut:.1%}",
            "FLOPs, vision": flops(cost.vision, cost.full),
            "FLOPs, captions": flops(cost.captions, cost.full) if captions else "-",
        },
        {
            "vision": duration(seconds.vision),
            "prefill": duration(seconds.prefill),
            "selection": duration(seconds.selection) if outcome.kept else "-",
            "second wave": duration(seconds.second_wave) if report.second_wave else "-",
            "captions, of it": duration(report.caption_seconds) if captions else "-",
            "decode": duration(seconds.decode) if steps else "-",
            "decode steps": f"{steps or '-'}",
            "decode per token": duration(seconds.decode / steps) if steps else "-",
        },
    ]


def told_stages(report: Report) -> str:
    """How many tokens each stage left, and on which kernels it ran, on one line."""
    told = zip(report.stages, report.paths, strict=True)
    stages = [f"layer {layer}: {before}→{after}, {path}" for (layer, before, after), path in told]
    return "; ".join(stages) or f"{report.visual_tokens:g} visual tokens in every layer"


def told_times(report: Report) -> str:
    """The durations of one run, on one line."""
    parts = vars(report.seconds).items()
    return ", ".join(f"{part.replace('_', ' ')} {duration(seconds)}" for part, seconds in parts if seconds)


def _bytes(count: int) -> str:
    """KV-cache memory, text and whole batch included."""
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
