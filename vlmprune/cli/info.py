"""The ``list`` and ``info`` commands: policies, versions, devices, and the backend of every op."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import MISSING
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmprune.ops._dispatch import TABLES, explain
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.registry import fields_of, load_policies

BUDGETS = (192, 128, 64)
WORDS = {True: "yes", False: "no"}
PACKAGES = ("vlmprune", "torch", "triton", "transformers", "numpy", "pillow", "flash-attn")


def show_policies(as_json: bool, as_markdown: bool = False) -> None:
    """Print every policy; JSON maps a name to its fields and facts, Markdown is the README's table.

    Entry points that cannot be used are named on stderr.
    """
    classes, faults = load_policies()
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)  # noqa: T201
    found = {name: describe_policy(cls) for name, cls in classes.items()}
    if as_json:
        return _print_json(found)
    if as_markdown:
        print(markdown_table(found))  # noqa: T201
        return None
    out = Table("name", "fields and defaults", "keeps", "acts", "paper", show_lines=True)
    for name, policy in found.items():
        fields = "\n".join(f"{field}={_typed(value)}" for field, value in policy["fields"].items())
        facts = f"{policy['acts']}\nreads {policy['reads']}\n{policy['checked']}"
        out.add_row(name, *map(Text, (fields, policy["summary"], facts, policy["paper"])))
    Console().print(out)


def markdown_table(found: dict[str, dict[str, Any]]) -> str:
    """The table of methods in the README."""
    heads = ("name", "class", "keeps", "acts", "text-aware", "CLS", "192 / 128 / 64", "checked", "from")
    rows = [heads, ("---",) * len(heads)]
    for name, policy in found.items():
        presets = " / ".join(f"`{policy['presets'][b]}`" for b in BUDGETS if b in policy["presets"])
        facts = ("summary", "acts", "text_aware", "cls")
        cells = (WORDS.get(policy[key], policy[key]) for key in facts)
        rows.append(
            (f"`{name}`", f"`{policy['class']}`", *cells, presets, policy["checked"], policy["paper"])
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe_policy(cls: type[PruningPolicy]) -> dict[str, Any]:
    """Fields with defaults (``"required"`` if there is none), summary, paper, what it reads and where it acts."""
    return {
        "class": cls.__name__,
        "fields": {k: "required" if v is MISSING else v for k, v in fields_of(cls).items()},
        "summary": cls.summary,
        "paper": cls.paper,
        "checked": cls.checked,
        "presets": dict(cls.presets),
        **_default_facts(cls),
    }


def _default_facts(cls: type[PruningPolicy]) -> dict[str, Any]:
    """Where a policy acts and what it reads, asked of its default settings."""
    if MISSING in fields_of(cls).values():
        return dict.fromkeys(("acts", "reads", "text_aware", "cls"), "as set")
    policy = cls()
    needs = [policy.needs(layer) for layer in policy.layers]
    reads = {
        "decoder attention": any(n.attention for n in needs),
        "prompt text": any(n.embeds or n.rows == "text" for n in needs),
        "vision attention": any(n.vision for n in needs),
        "hidden states": any(n.hidden for n in needs),
    }
    before = "before the LM" if policy.layers[0] == 0 else ""
    inside = ", ".join(str(layer) for layer in policy.layers if layer)
    acts = " and ".join(part for part in (before, f"layer {inside}" if inside else "") if part)
    return {
        "acts": acts,
        "reads": ", ".join(k for k, used in reads.items() if used) or "positions only",
        "text_aware": reads["decoder attention"] or reads["prompt text"],
        "cls": "used if there" if reads["vision attention"] else "no",
    }


def show_info(as_json: bool) -> None:
    """Print what is installed and what would run."""
    found = describe_machine()
    if as_json:
        return _print_json(found)
    console = Console()
    versions = Table("package", "version", "tested with")
    for name, number in found["versions"].items():
        tested = ", ".join(found["tested"].get(name, ()))
        versions.add_row(name, number or Text("not installed", style="dim"), tested)
    console.print(versions)
    for device in found["devices"]:
        console.print(Text(f"{device['name']}: {device['description']}"))
    for device, described in found["ops"].items():
        out = Table("op", "backend", "why not the others", title=f"ops on {device}", title_justify="left")
        for op, row in described.items():
            reasons = "\n".join(f"{name}: {why}" for name, why in row["refused"].items())
            out.add_row(op, row["backend"] or "none", Text(reasons or "-"))
        console.print(out)
        kernels = Table(
            "kernel", "why not", title=f'attn_implementation="vlmprune" on {device}', title_justify="left"
        )
        for kernel, reason in found["attention"][device].items():
            kernels.add_row(kernel, Text(reason or "-"))
        console.print(kernels)


def describe_machine() -> dict[str, Any]:
    """Versions, devices, and per kind of device: every op's backend and every attention kernel, or why it cannot run."""
    from vlmprune.models import TESTED, dotted  # imports transformers: only when asked
    from vlmprune.models import explain as explain_attention

    kinds = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "tested": {name: [dotted(number) for number in numbers] for name, numbers in TESTED.items()},
        "devices": _devices(),
        "ops": {kind: {op: describe_op(op, kind) for op in sorted(TABLES)} for kind in kinds},
        "attention": {kind: dict(explain_attention(kind)) for kind in kinds},
    }


def describe_op(op: str, device: str) -> dict[str, Any]:
    """The first backend of ``op`` that runs on ``device`` (None if none does), and the reasons of those that cannot."""
    rows = explain(op, torch.device(device))
    usable = [name for name, why in rows if why is None]
    refused = {name: why for name, why in rows if why is not None}
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


def _typed(value: Any) -> str:
    """A default as it is typed in ``--policy``."""
    if isinstance(value, tuple | list):
        return "/".join(map(str, value))
    return "none" if value is None else str(value)


def _print_json(found: Any) -> None:
    print(json.dumps(found, indent=2))  # noqa: T201
