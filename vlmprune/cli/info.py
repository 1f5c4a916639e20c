"""The ``info`` command: versions, devices, and the backend of every op."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

from vlmprune.cli.console import table
from vlmprune.cli.facts import layer_runs, usual
from vlmprune.cli.logs import versions
from vlmprune.cli.schedule import runs
from vlmprune.ops._dispatch import TABLES, explain
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.registry import load_policies


def show_info(as_json: bool) -> None:
    """Print what is installed and what would run."""
    found = describe_machine()
    if as_json:
        return print(json.dumps(found, indent=2))  # noqa: T201
    show, tested = Console().print, found["tested"]
    versions = found["versions"].items()
    rows = [(name, number or "not installed", ", ".join(tested.get(name, ()))) for name, number in versions]
    show(table(("package", "version", "tested with"), rows))
    for device in found["devices"]:
        show(f"{device['name']}: {device['description']}", markup=False, highlight=False)
    for device, ops in found["ops"].items():
        heads, title = ("ops", "backend", "why not the others"), f"ops on {device}"
        show(table(heads, _alike(ops), title=title, title_justify="left", show_lines=True))
        kernels = [(kernel, why or "-") for kernel, why in found["attention"][device].items()]
        title = f'attn_implementation="vlmprune" on {device}'
        show(table(("kernel", "why not"), kernels, title=title, title_justify="left"))
        show(f"prefills as CUDA graphs on {device}: {found['graphs'][device] or 'yes'}", highlight=False)
    stages = [(name, _how(own) or "as set") for name, own in found["stages"].items()]
    title = "stages (one pass: prune_tokens or prune_scored on the backends above)"
    show(table(("policy", "how its stages run"), stages, title=title, title_justify="left"))


def _alike(ops: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The ops of one backend, with the same reasons against the others, in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for op, row in ops.items():
        reasons = "\n".join(f"{name}: {why}" for name, why in row["refused"].items())
        rows.setdefault((row["backend"] or "none", reasons or "-"), []).append(op)
    return [("\n".join(names), *told) for told, names in rows.items()]


def _how(own: Mapping[str, str]) -> str:
    """How a policy's stages run, those that do so alike on one line."""
    return "\n".join(
        f"layer {', '.join(layer_runs([int(layer) for layer in own if own[layer] == path]))}: {path}"
        for path in dict.fromkeys(own.values())
    )


def describe_machine() -> dict[str, Any]:
    """Versions, devices, and per kind of device: every op's backend and every attention kernel, or why it cannot run."""
    from vlmprune.models import TESTED, Graphs, dotted  # imports transformers: only when asked
    from vlmprune.models import explain as explain_attention

    kinds = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    return {
        "versions": versions(),
        "tested": {name: [dotted(number) for number in numbers] for name, numbers in TESTED.items()},
        "devices": _devices(),
        "ops": {kind: {op: describe_op(op, kind) for op in sorted(TABLES)} for kind in kinds},
        "attention": {kind: dict(explain_attention(kind)) for kind in kinds},
        "graphs": {kind: Graphs.refusal(torch.device(kind)) for kind in kinds},
        "stages": {name: describe_stages(cls) for name, cls in load_policies()[0].items()},
    }


def describe_stages(cls: type[PruningPolicy]) -> dict[str, str]:
    """By stage layer, whether a policy with its defaults runs there as one fused pass, on the backends of the ops above."""
    policy = usual(cls)
    return {} if policy is None else {str(layer): run for layer, run in runs(policy).items()}


def describe_op(op: str, device: str) -> dict[str, Any]:
    """The first backend of ``op`` that runs on ``device`` (None if none does), and the reasons of those that cannot."""
    rows = explain(op, torch.device(device))
    usable, refused = [name for name, why in rows if why is None], {name: why for name, why in rows if why}
    return {"backend": usable[0] if usable else None, "refused": refused, "also": usable[1:]}


def _devices() -> list[dict[str, str]]:
    out = [{"name": "cpu", "description": f"{platform.machine()}, {torch.get_num_threads()} torch threads"}]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        text = f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        out.append({"name": f"cuda:{i}", "description": text})
    return out
