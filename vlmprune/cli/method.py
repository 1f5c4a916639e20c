"""``vlmprune list NAME``: one method in full, layer by layer, setting by setting, and how it was checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from vlmprune.cli.console import table
from vlmprune.cli.docstrings import agreement, settings_docs
from vlmprune.cli.facts import facts_of, layer_runs, typed
from vlmprune.cli.schedule import MODEL, beyond, inputs, mean, ranges, schedule
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.budgets import PUBLISHED, Published

BAR = 24
"""Width of a full bar."""
SOME = re.compile(r"(?:[^/]+/){8}")
"""Entries of a long tuple, behind which a line may end."""
CHECKED = {
    "formula": "compared with an independent implementation of the published formula",
    "reading": "a reading: the sources leave room",
}


def describe_method(
    cls: type[PruningPolicy], policy: PruningPolicy | None, of: Published = MODEL
) -> dict[str, Any]:
    """What ``vlmprune list NAME`` has beyond the facts of the table; a policy without settings has no schedule."""
    stages = [] if policy is None else schedule(policy, of)
    entering = [] if policy is None else inputs(policy, stages, of)
    return {
        "model": {"name": of.model, "layers": of.layers, "visual_tokens": of.visual},
        "schedule": stages,
        "inputs": entering,
        "beyond": beyond(stages, of),
        "mean_tokens": mean(stages, entering, of) if stages else None,
        "formula": cls.formula,
        "docs": settings_docs(cls),
        "agreement": agreement(cls),
    }


def show_method(name: str, found: Mapping[str, Any], kind: str) -> None:
    """Print one method.

    Args:
        name: as it was typed.
        found: its facts, and what ``describe_method`` says.
        kind: the policy's own name.
    """
    _show(f"{name} ({found['class']}): {found['summary'] or 'no summary'}", "bold")
    _show(f"from: {found['paper'] or 'unknown'}")
    _show("; ".join(facts_of(found)[:-1]))
    if found["formula"]:
        _head("formula")
        _show(found["formula"])
    if found["schedule"]:
        _head("stages")
        Console().print(table(("layer", "reads", "runs"), _stages(found["schedule"])))
        _show_inputs(found)
    else:
        _show("schedule: as set")
    _head("settings")
    settings = [
        (k, SOME.sub(r"\g<0>\n", typed(v)), found["docs"].get(k, "")) for k, v in found["fields"].items()
    ]
    Console().print(table(("setting", "value", "what it says"), settings))
    _head(f"checked: {CHECKED.get(found['checked'], found['checked'])}")
    for sentence in found["agreement"]:
        _show(f"- {sentence}")
    _show_presets(kind, found["presets"])


def _show(text: str, style: str = "") -> None:
    Console().print(Text(text, style=style))


def _head(text: str) -> None:
    _show(f"\n{text}", "bold")


def _stages(stages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """The stages; one after another that read the same are one row. Layer 0 stands before the language model."""
    for (reads, run), alike in groupby(stages, lambda stage: (stage["reads"], stage["runs"])):
        layers = [stage["layer"] for stage in alike]
        yield ", ".join(layer_runs(layers)) if layers != [0] else "0 (before the LM)", reads, run


def _show_inputs(found: Mapping[str, Any]) -> None:
    """How many visual tokens enter each layer, drawn; the mean, and which stages the model is too short for."""
    model = found["model"]
    layers, visual = model["layers"], model["visual_tokens"]
    _head(f"visual tokens, of {visual}, that enter each layer of {model['name']} ({layers} layers)")
    rows = [(f"{a}" if a == b else f"{a} to {b}", tokens) for a, b, tokens in ranges(found["inputs"])]
    width = max(len(label) for label, _ in rows)
    for label, tokens in rows:
        if tokens is None:
            _show(f"{label:>{width}}  known when chosen")
        else:
            bar = "█" * round(BAR * tokens / visual) or "▏" * (tokens > 0)
            _show(f"{label:>{width}}  {tokens:>{len(str(visual))}}  {bar:<{BAR}}  {tokens / visual:6.1%}")
    if found["mean_tokens"] is not None:
        left = found["mean_tokens"]
        _show(f"mean over the inputs of {layers} layers: {left:.1f} tokens, {left / visual:.1%}")
    if found["beyond"]:
        at = ", ".join(layer_runs(found["beyond"]))
        _show(
            f"beyond the last layer, {layers - 1}: layer {at}; such a model refuses this policy", "bold red"
        )


def _show_presets(kind: str, presets: Mapping[float, str]) -> None:
    """Model by model what meets published budgets, as typed; a budget that the method cannot meet is not there."""
    for model in PUBLISHED:
        budgets = [budget for budget in model.budgets if budget in presets]
        if budgets:
            _head(f"budgets published for {model.model} ({model.visual or 'any number of'} visual tokens)")
        for budget in budgets:
            line = f"{f'{budget}' if model.visual else f'{budget:.1%}':>6}  {kind}:{presets[budget]}"
            Console().print(Text(line), soft_wrap=True)  # whole, to be copied
