"""The ``list`` command: every policy with its facts, those that fit, and the README's table; of one there is more in ``method``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from rich.console import Console

from vlmprune.cli.console import table
from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy
from vlmprune.policies.budgets import PUBLISHED
from vlmprune.policies.recipe import policy_from
from vlmprune.policies.registry import fields_of, load_policies, name_of, policy_class

FACTS = {
    "keeps": "summary",
    "acts": "acts",
    "text-aware": "text_aware",
    "CLS": "cls",
    "grows": "growth",
}
"""Heading in the README's table -> fact."""
AS_SET = ("acts", "where", "reads", "text_aware", "cls", "positions", "growth")
"""What is not known of a policy that cannot be made without settings."""

Where = Literal["before", "inside", "both"]


@dataclass(frozen=True)
class Filters:
    """Which policies to list; None = all. What a policy says only once it has settings fits none of them.

    Args:
        where: "before" the language model, "inside" its layers, or "both".
        text_aware: whether a choice depends on the prompt's text.
        family: a ``model_type`` that it must work on, with the setting ``positions="keep"`` if it has one.
        budget: a published budget that one of its presets meets.

    Raises:
        InputError: nobody published at this budget.
    """

    where: Where | None = None
    text_aware: bool | None = None
    family: str | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        known = [budget for model in PUBLISHED for budget in model.budgets]
        check(self.budget in (None, *known), "budget", f"one of {', '.join(map(str, known))}", self.budget)

    def __str__(self) -> str:
        """As they are typed."""
        text = {None: "", True: "--text-aware", False: "--no-text-aware"}[self.text_aware]
        where = "" if self.where is None else f"--where {self.where}"
        family = "" if self.family is None else f"--family {self.family}"
        budget = "" if self.budget is None else f"--budget {self.budget:g}"
        return " ".join(filter(None, (where, text, family, budget)))


def show_policies(
    as_json: bool, as_markdown: bool = False, name: str | None = None, filters: Filters = Filters()
) -> None:
    """Print every policy that fits, or the one called ``name`` in full; JSON maps a name to its fields and facts, Markdown is
    the README's table.

    Entry points that cannot be used are named on stderr, and so is what fits or not as it is set.

    Args:
        name: a policy's name, or a policy as it is typed after ``--policy``.

    Raises:
        InputError: there is no policy of this name, its settings are wrong, or nothing is known of the family.
    """
    made, faults = load_made() if name is None else ({name: make(name)}, [])
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)  # noqa: T201
    found = {name: describe_policy(cls, policy) for name, (cls, policy) in made.items()}
    found = _fitting(found, {name: policy for name, (_, policy) in made.items()}, filters)
    if name in found:
        from vlmprune.cli.method import describe_method

        found[name].update(describe_method(*made[name]))
    if as_json:
        print(json.dumps(found, indent=2))  # noqa: T201
    elif not found:
        print(f"no policy fits {filters}")  # noqa: T201
    elif as_markdown:
        print(markdown_table(found))  # noqa: T201
    elif filters.budget is not None:
        for fitting, policy in found.items():
            kind = made[fitting][0]
            print(f"{name_of(kind)}:{policy['presets'][filters.budget]}")  # noqa: T201
    elif name is not None:
        from vlmprune.cli.method import show_method

        show_method(name, found[name], name_of(made[name][0]))
    else:
        _show_all(found)


def _show_all(found: Mapping[str, dict[str, Any]]) -> None:
    """Print the table of many."""
    rows = []
    for name, policy in found.items():
        fields = "\n".join(f"{field}={typed(value)}" for field, value in policy["fields"].items())
        rows.append((name, fields, policy["summary"], "\n".join(facts_of(policy)), policy["paper"]))
    heads = ("name", "fields and defaults", "keeps", "acts", "paper")
    Console().print(table(heads, rows, show_lines=True))


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


def markdown_table(found: Mapping[str, dict[str, Any]]) -> str:
    """The table of methods in the README; with what a family asks for in a column more."""
    words = {True: "yes", False: "no", None: "unknown"}
    budgets = PUBLISHED[0].budgets
    facts = FACTS | ({"with": "with"} if any("with" in policy for policy in found.values()) else {})
    heads = ["name", "class", *facts, " / ".join(map(str, budgets)), "checked", "from"]
    rows = [heads, ["---"] * len(heads)]
    for name, policy in found.items():
        presets = " / ".join(f"`{policy['presets'][b]}`" for b in budgets if b in policy["presets"])
        cells = (words.get(policy[fact], policy[fact]) for fact in facts.values())
        rows.append(
            [f"`{name}`", f"`{policy['class']}`", *cells, presets, policy["checked"], policy["paper"]]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


Made = tuple[type[PruningPolicy], PruningPolicy | None]
"""A class, and its policy with the settings asked for; None = it cannot be made without some."""


def load_made() -> tuple[dict[str, Made], list[str]]:
    """Every policy with its defaults, and what is wrong with each entry point that cannot be used."""
    classes, faults = load_policies()
    return {name: (cls, usual(cls)) for name, cls in classes.items()}, faults


def make(name: str) -> Made:
    """A policy by its name alone, with its defaults, or as it is typed after ``--policy``."""
    if any(sign in name for sign in ":+&|()") or name.endswith((".yaml", ".yml")):
        policy = policy_from(name)
        return type(policy), policy
    cls = policy_class(name)
    return cls, usual(cls)


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
    inside = ", ".join(_runs([layer for layer in policy.layers if layer]))
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
        "hidden states": any(n.hidden for n in all_of),
    }
    return [part for part, read in used.items() if read]


def _fitting(
    found: dict[str, dict[str, Any]], made: Mapping[str, PruningPolicy | None], filters: Filters
) -> dict[str, dict[str, Any]]:
    """Those that fit; with a family each one's settings for it are under "with"."""
    if filters == Filters():
        return found
    unknown = [name for name, policy in made.items() if policy is None]
    if unknown and filters != Filters(budget=filters.budget):
        print(f"left out, as it depends on their settings: {', '.join(unknown)}", file=sys.stderr)  # noqa: T201
    if filters.family is not None:
        for name, settings in _settings_for(filters.family, made).items():
            found[name]["with"] = settings
    return {
        name: facts
        for name, facts in found.items()
        if name not in unknown
        and filters.where in (None, facts["where"])
        and filters.text_aware in (None, facts["text_aware"])
        and (filters.family is None or "with" in facts)
        and (filters.budget is None or filters.budget in facts["presets"])
    }


def _settings_for(family: str, made: Mapping[str, PruningPolicy | None]) -> dict[str, str]:
    """Which policies work on a family, and with which settings beside their own: "" = with none."""
    from vlmprune.models.host.fitting import settings_for  # imports transformers: only when asked

    found = {name: settings_for(family, policy) for name, policy in made.items() if policy is not None}
    return {
        name: ",".join(f"{field}={typed(value)}" for field, value in settings.items())
        for name, settings in found.items()
        if settings is not None
    }


def typed(value: Any) -> str:
    """A default as it is typed in ``--policy``."""
    entries = value if isinstance(value, tuple | list) else [value]
    return "/".join("none" if entry is None else str(entry) for entry in entries)


def _data(value: Any) -> Any:
    """A setting as JSON has it: what is no data, a policy or a function, as its text."""
    if isinstance(value, tuple | list):
        return [_data(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _runs(layers: Sequence[int]) -> list[str]:
    """Ascending layers, three or more without a gap as "first to last"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [text for run in runs for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
