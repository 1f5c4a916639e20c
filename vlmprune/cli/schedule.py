"""A policy's schedule on a model of some depth: its stages, and how many visual tokens run every layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vlmprune.cli.facts import reading
from vlmprune.errors import InputError, ModelError
from vlmprune.flops import layer_inputs, mean_tokens, visual_inputs
from vlmprune.policies.base import Needs, PruningPolicy
from vlmprune.policies.budgets import PUBLISHED, Published
from vlmprune.policies.schedule import wave_rows

if TYPE_CHECKING:
    from vlmprune.checkpoints import Checkpoint

MODEL = PUBLISHED[0]
"""Whose schedule is shown if nothing is said: LLaVA-1.5."""
ROWS = {"last": "the last row", "text": "the text's rows", "all": "all rows"}


def model_of(depth: int | None, tokens: int | None) -> Published:
    """A model of ``depth`` layers that sees an image as ``tokens``; those of LLaVA-1.5 where they are not given."""
    if depth is None and tokens is None:
        return MODEL
    layers = MODEL.layers if depth is None else depth
    return Published("a model", layers, MODEL.visual if tokens is None else tokens, ())


def model_in(checkpoint: Checkpoint, tokens: int | None) -> Published:
    """The model of a checkpoint, by its configuration alone.

    Raises:
        InputError: no ``tokens`` where the picture decides how many there are.
    """
    from vlmprune.models import patch_grid  # imports transformers: only when asked

    config = checkpoint.config
    if tokens is None:
        try:
            rows, columns = patch_grid(config)
        except ModelError as error:
            expected = f"a number (how many {config.model_type} makes depends on the picture)"
            raise InputError(f"--tokens: expected {expected}, got none") from error
        tokens = rows * columns
    return Published(checkpoint.source, config.text_config.num_hidden_layers, tokens, ())


def schedule(policy: PruningPolicy, of: Published = MODEL) -> list[dict[str, Any]]:
    """Of each stage its layer, what it reads, how it runs, and what it leaves of one image.

    ``tokens`` are None from the stage on where how many stay is known only when they are chosen, until all are back.
    """
    tokens: int | None = of.visual
    stages = []
    for layer, run in runs(policy).items():
        needs = policy.needs(layer)
        tokens = of.visual if needs.restored else tokens
        tokens = None if tokens is None else _kept(policy, tokens, layer)
        reads = ", ".join(_reads(needs)) or "positions only"
        stages.append({"layer": layer, "reads": reads, "runs": run, "tokens": tokens})
    return stages


def runs(policy: PruningPolicy) -> dict[int, str]:
    """By layer, whether the stage runs as one fused pass, where its backends can."""
    return {layer: "one pass" if policy.ranks(layer) else "chooses by itself" for layer in policy.layers}


def inputs(
    policy: PruningPolicy, stages: Sequence[dict[str, Any]], of: Published = MODEL
) -> list[int | None]:
    """How many visual tokens run each layer, those of a second wave too; None = known when they are chosen.

    Stages beyond the last layer are not looked at.
    """
    counts = [(stage["layer"], stage["tokens"]) for stage in stages if stage["layer"] < of.layers]
    visual = of.visual or 0
    if all(tokens is not None for _, tokens in counts):
        return [*visual_inputs(of.layers, visual, counts, wave_rows(policy, counts, 0))]
    known = layer_inputs(of.layers, visual, [(layer, -1 if n is None else n) for layer, n in counts])
    return [None if tokens < 0 else tokens for tokens in known]


def beyond(stages: Sequence[dict[str, Any]], of: Published = MODEL) -> list[int]:
    """The layers of stages that a model does not have."""
    return [stage["layer"] for stage in stages if stage["layer"] >= of.layers]


def mean(
    stages: Sequence[dict[str, Any]], entering: Sequence[int | None], of: Published = MODEL
) -> float | None:
    """Over the inputs of the layers; None where a count is unknown or a stage lies beyond them."""
    known = [tokens for tokens in entering if tokens is not None]
    return mean_tokens(known) if len(known) == of.layers and not beyond(stages, of) else None


def ranges(entering: Sequence[int | None]) -> list[tuple[int, int, int | None]]:
    """First and last layer of those one after another that as many tokens enter, and how many.

    >>> ranges([576, 576, 166, 166, 166, None])
    [(0, 1, 576), (2, 4, 166), (5, 5, None)]
    """
    found = []
    for tokens, layers in groupby(range(len(entering)), entering.__getitem__):
        own = [*layers]
        found.append((own[0], own[-1], tokens))
    return found


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
        first = " (which then run the layers before)" if needs.wave else ""
        parts.insert(0, f"tokens that were set aside{first}")
    return parts
