"""The page of one method, part by part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from sitepages.examples import command_of, python_of
from sitepages.prose import head_and_rest, literal, rows, sources
from sitepages.tree import ROOT
from vlmprune.cli.docstrings import agreement
from vlmprune.cli.facts import describe_policy, layer_runs, typed, usual
from vlmprune.cli.method import CHECKED, describe_method
from vlmprune.cli.schedule import ranges
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.budgets import PUBLISHED

PROSE = {"accm": "accm.md", "learned": "scorers.md", "sgl": "policies.md", "scout": "scout.md"}
"""Methods about which there is more to read."""


def method_page(name: str, cls: type[PruningPolicy], drawn: Mapping[str, Any]) -> str:
    """Everything that is known of a method; ``drawn`` is the ``gallery.json``."""
    facts = describe_policy(cls) | describe_method(cls, usual(cls))
    parts = [_head(name, cls, facts), _picture(name, cls, drawn), _formula(cls), _use(name, cls)]
    parts += [_settings(facts), _schedule(facts), _presets(name, facts), _checked(cls, facts)]
    return "\n\n".join(parts) + "\n"


def word(fact: Any) -> str:
    """A fact as the tables of ``vlmprune list`` have it."""
    return {True: "yes", False: "no"}.get(fact, str(fact))


def _head(name: str, cls: type[PruningPolicy], facts: Mapping[str, Any]) -> str:
    """What it does, and its facts in a line."""
    known = {
        "on the command line": f"`{name}`",
        "acts": facts["acts"],
        "reads": facts["reads"],
        "text-aware": facts["text_aware"],
        "CLS": facts["cls"],
        "positions": facts["positions"],
        "work grows as": facts["growth"],
    }
    line = " · ".join(f"{fact}: **{word(value)}**" for fact, value in known.items())
    more = f"\n\nMore about it: [docs/{PROSE[name]}](../docs/{PROSE[name]})." if name in PROSE else ""
    return f"# {cls.__name__}\n\n{head_and_rest(cls)[0]}\n\n{line}{more}"


def _picture(name: str, cls: type[PruningPolicy], drawn: Mapping[str, Any]) -> str:
    """What it keeps, or why there is no picture."""
    why = {one["method"]: one["why"] for one in drawn["left_out"]}
    if name in why:
        return f"## What it keeps\n\nNo picture: {literal(why[name])}."
    budgets, tokens = drawn["budgets"], drawn["visual_tokens"]
    own = [[one for one in drawn["answers"] if (one["method"], one["budget"]) == (name, b)] for b in budgets]
    right = (f"{sum(one['right'] for one in answers)} of {len(answers)}" for answers in own)
    star = {True: "", False: " \\*"}
    policies = (f"`{answers[0]['policy']}`{star[answers[0]['meets']]}" for answers in own)
    over = any(not answers[0]["meets"] for answers in own)
    note = "\n\n\\* The layers ahead of its first stage alone cost more." if over else ""
    table = rows(
        ("visual tokens, mean over the layers", "right answers", "`--policy`"),
        zip((f"{budget:g}" for budget in budgets), right, policies, strict=True),
    )
    return (
        f"## What it keeps\n\n[![What {cls.__name__} keeps of {tokens} visual tokens]({name}.webp)]({name}.webp)\n\n"
        f"{table}{note}\n\nOf {tokens} visual tokens, in the {drawn['layers']} layers of [a model that is far too small for "
        "claims about methods](../examples/glyphworld/README.md): look at where the tokens are, not at who is right. "
        "Drawn by `vlmprune gallery`."
    )


def _formula(cls: type[PruningPolicy]) -> str:
    """The formula, and what the docstring says beyond its head, but for paragraphs that are about sources alone."""
    told = " ".join(agreement(cls))
    rest = [
        text
        for text in head_and_rest(cls)[1]
        if "\n- " in text or not all(s in told for s in _sentences(text))
    ]
    parts = [f"## Formula\n\n```text\n{cls.formula.strip()}\n```", *(["## In detail", *rest] if rest else [])]
    return "\n\n".join(parts)


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(text.replace("`", "").split()))


def _use(name: str, cls: type[PruningPolicy]) -> str:
    """A command and the lines of Python."""
    command = command_of(name, cls)
    shell = (
        f"```bash\n{command}\n```\n\nor from Python, with a [`model` and its `inputs`](../docs/start.md):\n\n"
    )
    return f"## Use it\n\n{shell if command else ''}```python\n{python_of(name, cls)}\n```"


def _settings(facts: Mapping[str, Any]) -> str:
    """Every setting with its default and what the docstring says of it."""
    cells = []
    for name, value in facts["fields"].items():
        default = typed(value).replace("\n", "\\n")
        cells.append((f"`{name}`", f"`{default}`", literal(facts["docs"].get(name, ""))))
    return f"## Settings\n\n{rows(('setting', 'default', 'what it says'), cells)}"


def _schedule(facts: Mapping[str, Any]) -> str:
    """With the default settings: what each stage reads, and how many visual tokens enter each layer."""
    if not facts["schedule"]:
        return "## Schedule\n\nAs set."
    stages = []
    for (reads, run), alike in groupby(facts["schedule"], lambda stage: (stage["reads"], stage["runs"])):
        layers = [stage["layer"] for stage in alike]
        stages.append(("before the LM" if layers == [0] else ", ".join(layer_runs(layers)), reads, run))
    model, visual = facts["model"], facts["model"]["visual_tokens"]
    entering = [
        (f"{first}" if first == last else f"{first} to {last}", *_share(tokens, visual))
        for first, last, tokens in ranges(facts["inputs"])
    ]
    mean = facts["mean_tokens"]
    total = "" if mean is None else f"\n\nA mean of {mean:.1f} over the layers, {mean / visual:.1%}."
    return (
        f"## Schedule\n\nWith the defaults, on {model['name']}: {model['layers']} layers, {visual} visual tokens.\n\n"
        f"{rows(('stage at layer', 'reads', 'runs'), stages)}\n\n"
        f"{rows(('layers', 'visual tokens that enter', 'share'), entering)}{total}"
    )


def _share(tokens: int | None, visual: int) -> tuple[str, str]:
    """A count, and its share as a bar."""
    if tokens is None:
        return "known when chosen", ""
    share = f"{tokens / visual:.1%}"
    return f"{tokens}", f'<span class="bar"><span style="width: {share}"></span></span> {share}'


def _presets(name: str, facts: Mapping[str, Any]) -> str:
    """What meets published budgets; one that the method cannot meet is not there."""
    cells = [
        (
            model.model,
            f"{budget}" if model.visual else f"{budget:.1%}",
            f"`{name}:{facts['presets'][budget]}`",
        )
        for model in PUBLISHED
        for budget in model.budgets
        if budget in facts["presets"]
    ]
    table = rows(("model", "visual tokens, mean over the layers", "`--policy`"), cells)
    return f"## Published budgets\n\n{table if cells else 'No settings of published tables are known.'}"


def _checked(cls: type[PruningPolicy], facts: Mapping[str, Any]) -> str:
    """How far it was compared with its sources, these, and where its code is."""
    module = cls.__module__.replace(".", "/") + ".py"
    tests = f"tests/policies/test_{Path(module).stem}.py"
    tested = f" Its tests: `{tests}`." if (ROOT / tests).is_file() else ""
    told = "\n".join(f"- {literal(sentence)}" for sentence in facts["agreement"])
    how = CHECKED.get(facts["checked"], facts["checked"])
    return (
        f"## How far it was checked\n\n{how[0].upper()}{how[1:]}.{tested}\n\n{told}\n\n"
        f"## From\n\n{sources(cls.paper)}\n- The code here: [`{module}`](../{module})"
    )
