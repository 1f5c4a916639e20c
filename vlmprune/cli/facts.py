"""A policy's facts as the command line shows them: fields, what it reads, where it acts, how its work grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from vlmprune.policies.base import Needs, PruningPolicy
from vlmprune.policies.registry import fields_of

AS_SET = ("acts", "where", "reads", "text_aware", "cls", "positions", "growth")
"""What is not known of a policy that cannot be made without settings."""


def usual(cls: type[PruningPolicy]) -> PruningPolicy | None:
    """A policy with its defaults; None if it cannot be made without settings."""
    return None if MISSING in fields_of(cls).values() else cls()


def describe_policy(cls: type[PruningPolicy], policy: PruningPolicy | None = None) -> dict[str, Any]:
    """Fields with defaults (``"required"`` if there is none), summary, paper, what it reads, where it acts, how it grows.

    Args:
        policy: one with other settings than the defaults; those are then its fields.
    """
    fields = fields_of(cls)
    policy = usual(cls) if policy is None else policy
    if policy is not None:
        fields = {field: getattr(policy, field) for field in fields}
    return {
        "class": cls.__name__,
        "fields": {k: "required" if v is MISSING else _data(v) for k, v in fields.items()},
        "summary": cls.summary,
        "paper": cls.paper,
        "checked": cls.checked if cls.paper else "names no source",
        "presets": dict(cls.presets),
        **(dict.fromkeys(AS_SET, "as set") if policy is None else _facts(policy)),
    }


def _facts(policy: PruningPolicy) -> dict[str, Any]:
    """Where a policy acts, what it reads, and how its work grows."""
    reads = reading(policy.needs(layer) for layer in policy.layers)
    before = "before the LM" if policy.layers[0] == 0 else ""
    inside = ", ".join(layer_runs([layer for layer in policy.layers if layer]))
    return {
        "acts": " and ".join(part for part in (before, f"layer {inside}" if inside else "") if part),
        "where": "both" if before and inside else "before" if before else "inside",
        "reads": ", ".join(reads) or "positions only",
        "text_aware": "decoder attention" in reads or "prompt text" in reads,
        "cls": "used if there" if "vision attention" in reads else "no",
        "positions": "pack" if policy.packs else "keep",
        "growth": policy.growth,
    }


def reading(needs: Iterable[Needs]) -> list[str]:
    """What is read for these needs together, in words."""
    all_of = list(needs)
    used = {
        "decoder attention": any(n.attention and not n.keys_only for n in all_of),
        "decoder keys": any(n.keys_only for n in all_of),
        # rows of nothing that is read say where the text is, and no more
        "prompt text": any(
            n.embeds or n.text or n.tokens or (n.rows == "text" and n.attention) for n in all_of
        ),
        "vision attention": any(n.vision for n in all_of),
        "hidden states": any(n.hidden or n.earlier for n in all_of),
    }
    return [part for part, read in used.items() if read]


def facts_of(policy: Mapping[str, Any]) -> list[str]:
    """A policy's facts, one a line."""
    facts = [policy["acts"], f"reads {policy['reads']}", f"grows as {policy['growth'] or 'unknown'}"]
    settings = policy.get("with")
    needed = [f"there with {settings}"] if settings else []
    return [
        *(["acts, reads and grows as set"] if policy["acts"] == "as set" else facts),
        *needed,
        policy["checked"],
    ]


def typed(value: Any) -> str:
    """A default as it is typed in ``--policy``."""
    entries = value if isinstance(value, tuple | list) else [value]
    words = {None: "none", True: "true", False: "false"}
    return "/".join(
        words[entry] if entry is None or isinstance(entry, bool) else f"{entry}" for entry in entries
    )


def _data(value: Any) -> Any:
    """A setting as JSON has it: what is no data, a policy or a function, as its text."""
    if isinstance(value, tuple | list):
        return [_data(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def layer_runs(layers: Sequence[int]) -> list[str]:
    """Ascending layers, three or more without a gap as "first to last"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [text for run in runs for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
