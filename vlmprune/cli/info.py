"""The ``list`` and ``info`` commands: policies, versions, devices, and the backend of every op."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console

from vlmprune.cli.console import table
from vlmprune.ops._dispatch import TABLES, explain
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.budgets import PUBLISHED
from vlmprune.policies.registry import fields_of, load_policies, policy_class

PACKAGES = ("vlmprune", "torch", "triton", "transformers", "numpy", "pillow", "flash-attn")
FACTS = {
    "keeps": "summary",
    "acts": "acts",
    "text-aware": "text_aware",
    "CLS": "cls",
    "grows": "growth",
}
"""Heading in the README's table -> fact."""
AS_SET = ("acts", "reads", "text_aware", "cls", "growth")
"""What is not known of a policy that cannot be made without settings."""


def show_policies(as_json: bool, as_markdown: bool = False, name: str | None = None) -> None:
    """Print every policy, or the one called ``name`` with its presets; JSON maps a name to its fields and facts, Markdown is
    the README's table.

    Entry points that cannot be used are named on stderr.

    Raises:
        InputError: there is no policy of this name.
    """
    if name is None:
        classes, faults = load_policies()
    else:
        classes, faults = {name: policy_class(name)}, []
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)  # noqa: T201
    found = {name: describe_policy(cls) for name, cls in classes.items()}
    if as_json:
        print(json.dumps(found, indent=2))  # noqa: T201
    elif as_markdown:
        print(markdown_table(found))  # noqa: T201
    else:
        heads = ("name", "fields and defaults", "keeps", "acts", "paper")
        rows = []
        for name, policy in found.items():
            fields = "\n".join(f"{field}={_typed(value)}" for field, value in policy["fields"].items())
            facts = f"{policy['acts']}\nreads {policy['reads']}\ngrows as {policy['growth'] or 'unknown'}\n{policy['checked']}"
            rows.append((name, fields, policy["summary"], facts, policy["paper"]))
        Console().print(table(heads, rows, show_lines=True))
        if name is not None:
            show_presets(name, found[name]["presets"])


def show_presets(name: str, presets: Mapping[float, str]) -> None:
    """Print what meets published budgets, as typed; a budget that the method cannot meet is not there."""
    rows = []
    for model, _, visual, budgets in PUBLISHED:
        for budget in (b for b in budgets if b in presets):
            size = f"{budget}" if visual else f"{budget:.1%}"
            rows.append((model, str(visual or "any"), size, f"{name}:{presets[budget]}"))
    if rows:
        Console().print(table(("model", "visual tokens", "budget", "--policy"), rows))


def markdown_table(found: dict[str, dict[str, Any]]) -> str:
    """The table of methods in the README."""
    words = {True: "yes", False: "no", None: "unknown"}
    budgets = PUBLISHED[0].budgets
    heads = ["name", "class", *FACTS, " / ".join(map(str, budgets)), "checked", "from"]
    rows = [heads, ["---"] * len(heads)]
    for name, policy in found.items():
        presets = " / ".join(f"`{policy['presets'][b]}`" for b in budgets if b in policy["presets"])
        cells = (words.get(policy[fact], policy[fact]) for fact in FACTS.values())
        rows.append(
            [f"`{name}`", f"`{policy['class']}`", *cells, presets, policy["checked"], policy["paper"]]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe_policy(cls: type[PruningPolicy]) -> dict[str, Any]:
    """Fields with defaults (``"required"`` if there is none), summary, paper, what it reads, where it acts, how it grows."""
    fields = fields_of(cls)
    usual = None if MISSING in fields.values() else cls()
    return {
        "class": cls.__name__,
        "fields": {k: "required" if v is MISSING else v for k, v in fields.items()},
        "summary": cls.summary,
        "paper": cls.paper,
        "checked": cls.checked,
        "presets": dict(cls.presets),
        **(_facts(usual) if usual else dict.fromkeys(AS_SET, "as set")),
    }


def _facts(policy: PruningPolicy) -> dict[str, Any]:
    """Where a policy acts, what it reads, and how its work grows."""
    needs = [policy.needs(layer) for layer in policy.layers]
    reads = {
        "decoder attention": any(n.attention and not n.keys_only for n in needs),
        "decoder keys": any(n.keys_only for n in needs),
        # rows of nothing that is read say where the text is, and no more
        "prompt text": any(n.reads_text and (n.embeds or n.text or n.attention) for n in needs),
        "vision attention": any(n.vision for n in needs),
        "hidden states": any(n.hidden for n in needs),
    }
    before = "before the LM" if policy.layers[0] == 0 else ""
    inside = ", ".join(_runs([layer for layer in policy.layers if layer]))
    return {
        "acts": " and ".join(part for part in (before, f"layer {inside}" if inside else "") if part),
        "reads": ", ".join(k for k, used in reads.items() if used) or "positions only",
        "text_aware": reads["decoder attention"] or reads["prompt text"],
        "cls": "used if there" if reads["vision attention"] else "no",
        "growth": policy.growth,
    }


def _runs(layers: Sequence[int]) -> list[str]:
    """Ascending layers, three or more without a gap as "first to last"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [text for run in runs for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]


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
    if MISSING in fields_of(cls).values():
        return {}
    policy = cls()
    return {str(layer): "one pass" if policy.ranks(layer) else "chooses by itself" for layer in policy.layers}


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


def _typed(value: Any) -> str:
    """A default as it is typed in ``--policy``."""
    entries = value if isinstance(value, tuple | list) else [value]
    return "/".join("none" if entry is None else str(entry) for entry in entries)
