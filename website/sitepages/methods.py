"""One page a method, made of the registry and the docstrings; and the table of all of them, which leads there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sitepages.method import method_page, word
from sitepages.prose import ARXIV, linked_papers, rows
from vlmprune.cli.facts import describe_policy
from vlmprune.policies.budgets import PUBLISHED
from vlmprune.policies.registry import BUILT_IN

INDEX = "docs/policies.md"
"""The page of all methods."""
TABLE = re.compile(r"<!-- `vlmprune list --markdown` -->\n.*?<!-- end -->\n", re.DOTALL)
"""Its table, which on GitHub holds what is on the site on the methods' pages."""
GROUPS = {
    "before": "Before the decoder",
    "inside": "Inside it",
    "both": "Before and inside",
    "as set": "As set",
}
"""Where a method acts -> heading in the navigation."""
BUDGETS = PUBLISHED[0].budgets
KEPT = """<div class="methods" markdown="1">

{table}

</div>

### What they keep

[![What every method keeps of 576 visual tokens, at means of 192, 128 and 64](../methods/sheet.webp)](../methods/sheet.webp)

Drawn by `vlmprune gallery`, from [a model that is far too small for claims about methods](../examples/glyphworld/README.md). \
Without a picture, each with the reason on its page: {left_out}.
"""
COLUMNS = {
    "keeps": "summary",
    "acts": "acts",
    "text-aware": "text_aware",
    "CLS": "cls",
    "grows": "growth",
    "checked": "checked",
}
"""Heading in the table of all methods -> fact."""


def navigation() -> list[Any]:
    """The pages of methods, grouped by where they act."""
    groups: dict[str, list[Any]] = {title: [] for title in (*GROUPS.values(), "Baselines")}
    for name, cls in BUILT_IN.items():
        baseline = cls.paper.startswith("baseline")
        title = "Baselines" if baseline else GROUPS[describe_policy(cls)["where"]]
        groups[title].append({cls.__name__: page_of(name)})
    return [{"All methods": INDEX}, *({title: pages} for title, pages in groups.items())]


def page_of(name: str) -> str:
    """Where a method's page is."""
    return f"methods/{name}.md"


def pages(drawn: Mapping[str, Any]) -> dict[str, str]:
    """The pages by path.

    Args:
        drawn: the ``gallery.json`` of ``vlmprune gallery``.
    """
    return {page_of(name): method_page(name, cls, drawn) for name, cls in BUILT_IN.items()}


def with_own_table(text: str, drawn: Mapping[str, Any]) -> str:
    """The page of all methods with a table that leads to theirs, and what each keeps of one picture.

    Raises:
        ValueError: it has no table.
    """
    cells = []
    for name, cls in BUILT_IN.items():
        facts = describe_policy(cls)
        told = (word(facts[fact]) for fact in COLUMNS.values())
        presets = "<br>".join(f"`{cls.presets[budget]}`" for budget in BUDGETS if budget in cls.presets)
        papers = ", ".join(f"arXiv {number}" for number in ARXIV.findall(cls.paper)) or cls.paper
        cells.append((f"[`{name}`](../{page_of(name)})", *told, linked_papers(papers), presets))
    left_out = ", ".join(f"[{one['method']}](../{page_of(one['method'])})" for one in drawn["left_out"])
    shown = KEPT.format(
        table=rows(("name", *COLUMNS, "from", " / ".join(map(str, BUDGETS))), cells), left_out=left_out
    )
    filled, times = TABLE.subn(lambda _: shown, text)
    if times != 1:
        raise ValueError(f"{INDEX}: expected one table of `vlmprune list --markdown`, got {times}")
    return filled
