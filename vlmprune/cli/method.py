"""``vlmprune list NAME``: one method in full, layer by layer, setting by setting, and how it was checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from vlmprune.cli.console import table
from vlmprune.cli.docstrings import agreement, settings_docs
from vlmprune.cli.facts import facts_of, reading, typed
from vlmprune.errors import InputError
from vlmprune.flops import mean_tokens, visual_inputs
from vlmprune.policies.base import Needs, PruningPolicy
from vlmprune.policies.budgets import PUBLISHED
from vlmprune.policies.schedule import wave_rows

MODEL = PUBLISHED[0]
ROWS = {"last": "the last row", "text": "the text's rows", "all": "all rows"}
CHECKED = {
    "formula": "compared with an independent implementation of the published formula",
    "reading": "a reading: the sources leave room",
}


def describe_method(cls: type[PruningPolicy], policy: PruningPolicy | None) -> dict[str, Any]:
    """What ``vlmprune list NAME`` has beyond the facts of the table; a policy without settings has no schedule."""
    stages = [] if policy is None else schedule(policy)
    return {
        "schedule": stages,
        "mean_tokens": _mean(stages, policy) if policy is not None and stages else None,
        "docs": settings_docs(cls),
        "agreement": agreement(cls),
    }


def schedule(policy: PruningPolicy) -> list[dict[str, Any]]:
    """Of each stage its layer, what it reads, how it runs, and what it leaves of one image of LLaVA-1.5.

    ``tokens`` are None from the stage on where how many stay is known only when they are chosen, until all are back.
    """
    tokens: int | None = MODEL.visual
    stages = []
    for layer, run in runs(policy).items():
        needs = policy.needs(layer)
        tokens = MODEL.visual if needs.restored else tokens
        tokens = None if tokens is None else _kept(policy, tokens, layer)
        reads = ", ".join(_reads(needs)) or "positions only"
        stages.append({"layer": layer, "reads": reads, "runs": run, "tokens": tokens})
    return stages


def runs(policy: PruningPolicy) -> dict[int, str]:
    """By layer, whether the stage runs as one fused pass, where its backends can."""
    return {layer: "one pass" if policy.ranks(layer) else "chooses by itself" for layer in policy.layers}


def _kept(policy: PruningPolicy, tokens: int, layer: int) -> int | None:
    try:
        return policy.kept(tokens, 1, layer)
    except InputError:
        return None


def _reads(needs: Needs) -> list[str]:
    """What a stage reads, by where from."""
    parts = [part for part in reading([needs]) if not part.startswith(("decoder", "vision"))]
    if needs.vision:
        parts.insert(0, f"query and key of vision layer {', '.join(map(str, needs.vision))}")
    if needs.attention is not None:
        what = "keys" if needs.keys_only else f"query ({ROWS[needs.rows]}) and keys"
        parts.insert(
            0, f"{what} of {'the layer before' if needs.attention == 'previous' else 'its own layer'}"
        )
    if needs.restored:
        parts.insert(0, "tokens that were set aside")
    return parts


def _mean(stages: list[dict[str, Any]], policy: PruningPolicy) -> float | None:
    """Over the inputs of LLaVA-1.5's layers; None where a count is unknown or a stage lies beyond them."""
    counts = [(stage["layer"], stage["tokens"]) for stage in stages]
    if any(layer >= MODEL.layers or tokens is None for layer, tokens in counts):
        return None
    wave = wave_rows(policy, counts, 0)
    return mean_tokens(visual_inputs(MODEL.layers, MODEL.visual or 0, counts, wave))


def show_method(name: str, found: Mapping[str, Any], kind: str) -> None:
    """Print one method.

    Args:
        name: as it was typed.
        found: its facts, and what ``describe_method`` says.
        kind: the policy's own name.
    """

    def show(text: str) -> None:
        Console().print(Text(text))

    def show_table(heads: tuple[str, ...], rows: Sequence[Sequence[str]], title: str) -> None:
        if rows:
            Console().print(table(heads, rows, title=title, title_justify="left"))

    show(f"{name} ({found['class']}): {found['summary'] or 'no summary'}")
    show(f"from: {found['paper'] or 'unknown'}")
    show("; ".join(facts_of(found)[:-1]))
    show_table(
        ("layer", "reads", "runs", "visual tokens", "share"),
        [_stage_row(stage) for stage in found["schedule"]],
        f"schedule, of {MODEL.visual} visual tokens ({MODEL.model})",
    )
    if not found["schedule"]:
        show("schedule: as set")
    if found["mean_tokens"] is not None:
        share = found["mean_tokens"] / (MODEL.visual or 1)
        show(f"mean over the inputs of {MODEL.layers} layers: {found['mean_tokens']:.1f} tokens, {share:.1%}")
    settings = [(k, typed(v), found["docs"].get(k, "")) for k, v in found["fields"].items()]
    show_table(("setting", "value", "what it says"), settings, "settings")
    show(f"checked: {CHECKED.get(found['checked'], found['checked'])}")
    for sentence in found["agreement"]:
        show(f"- {sentence}")
    show_table(("model", "visual tokens", "budget", "--policy"), _presets(kind, found["presets"]), "presets")


def _stage_row(stage: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of the schedule's table; layer 0 stands before the language model."""
    tokens = stage["tokens"]
    counted = (
        ("known when chosen", "") if tokens is None else (f"{tokens}", f"{tokens / (MODEL.visual or 1):.1%}")
    )
    return (f"{stage['layer'] or '0 (before the LM)'}", stage["reads"], stage["runs"], *counted)


def _presets(kind: str, presets: Mapping[float, str]) -> list[tuple[str, ...]]:
    """What meets published budgets, as typed; a budget that the method cannot meet is not there."""
    return [
        (
            model.model,
            f"{model.visual or 'any'}",
            f"{b}" if model.visual else f"{b:.1%}",
            f"{kind}:{presets[b]}",
        )
        for model in PUBLISHED
        for b in model.budgets
        if b in presets
    ]
