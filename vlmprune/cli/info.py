"""The ``info`` command: versions, devices, and the backend of every op."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console

from vlmprune.cli.console import table
from vlmprune.cli.facts import usual
from vlmprune.cli.method import runs
from vlmprune.ops._dispatch import TABLES, explain
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.registry import load_policies

PACKAGES = ("vlmprune", "torch", "triton", "transformers", "numpy", "pillow", "flash-attn")


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
        rows = []
        for op, row in ops.items():
            reasons = "\n".join(f"{name}: {why}" for name, why in row["refused"].items())
            rows.append((op, row["backend"] or "none", reasons or "-"))
        heads, title = ("op", "backend", "why not the others"), f"ops on {device}"
        show(table(heads, rows, title=title, title_justify="left"))
        kernels = [(kernel, why or "-") for kernel, why in found["attention"][device].items()]
        title = f'attn_implementation="vlmprune" on {device}'
        show(table(("kernel", "why not"), kernels, title=title, title_justify="left"))
        show(f"prefills as CUDA graphs on {device}: {found['graphs'][device] or 'yes'}", highlight=False)
    stages = [
        (name, "\n".join(f"layer {layer}: {path}" for layer, path in own.items()) or "as set")
        for name, own in found["stages"].items()
    ]
    title = "stages (one pass: prune_tokens or prune_scored on the backends above)"
    show(table(("policy", "how its stages run"), stages, title=title, title_justify="left"))


def describe_machine() -> dict[str, Any]:
    """Versions, devices, and per kind of device: every op's backend and every attention kernel, or why it cannot run."""
    from vlmprune.models import TESTED, Graphs, dotted  # imports transformers: only when asked
    from vlmprune.models import explain as explain_attention

    kinds = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
