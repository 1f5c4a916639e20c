"""The ``list`` command: every policy with its facts, those that fit, and the table of docs/policies.md; ``method`` has one in full."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmprune.cli.console import table
from vlmprune.cli.facts import describe_policy, facts_of, typed, usual
from vlmprune.cli.method import describe_method, show_method
from vlmprune.cli.schedule import MODEL
from vlmprune.errors import check
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.budgets import PUBLISHED, Published
from vlmprune.policies.recipe import policy_from
from vlmprune.policies.registry import load_policies, name_of, policy_class

FACTS = {
    "keeps": "summary",
    "acts": "acts",
    "text-aware": "text_aware",
    "CLS": "cls",
    "grows": "growth",
}
"""Heading in the table of docs/policies.md -> fact."""

COLUMNS = {
    "keeps": "summary",
    "acts": "acts",
    "reads": "reads",
    "grows": "growth",
    "checked": "checked",
}
"""The same of a table on a wide terminal."""
WIDE = 120
"""Columns that such a table needs."""
MORE = "\nvlmprune list NAME: formula, schedule layer by layer, settings, published budgets, sources"

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
    as_json: bool,
    as_markdown: bool = False,
    name: str | None = None,
    filters: Filters = Filters(),
    of: Published = MODEL,
) -> None:
    """Print every policy that fits, or the one called ``name`` in full; JSON maps a name to its fields and facts, Markdown is
    the table of docs/policies.md.

    Entry points that cannot be used are named on stderr, and so is what fits or not as it is set.

    Args:
        name: a policy's name, or a policy as it is typed after ``--policy``.
        of: the model whose schedule is shown.

    Raises:
        InputError: there is no policy of this name, its settings are wrong, or nothing is known of the family.
    """
    made, faults = load_made() if name is None else ({name: make(name)}, [])
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)  # noqa: T201
    found = {name: describe_policy(cls, policy) for name, (cls, policy) in made.items()}
    found = _fitting(found, {name: policy for name, (_, policy) in made.items()}, filters)
    if name in found:
        found[name].update(describe_method(*made[name], of))
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
        show_method(name, found[name], name_of(made[name][0]))
    else:
        _show_all(found)


def _show_all(found: Mapping[str, dict[str, Any]]) -> None:
    """Print many: a table where there is room for one, else two or three lines each."""
    console = Console()
    if console.width >= WIDE:
        columns = COLUMNS | ({"with": "with"} if any("with" in policy for policy in found.values()) else {})
        rows = ((name, *(policy[fact] or "-" for fact in columns.values())) for name, policy in found.items())
        console.print(table(("name", *columns), rows, box=SIMPLE_HEAD))
    else:
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="bold", no_wrap=True)
        for name, policy in found.items():
            lines.add_row(
                name, Text.assemble(policy["summary"], "\n", ("; ".join(facts_of(policy)[:-1]), "dim"))
            )
        console.print(lines)
    console.print(Text(MORE, style="dim"))


def markdown_table(found: Mapping[str, dict[str, Any]]) -> str:
    """The table of methods in docs/policies.md; with what a family asks for in a column more."""
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
