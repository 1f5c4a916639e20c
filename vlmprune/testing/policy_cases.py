"""The situations in which a policy is asked: batches, images and values that real prompts bring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from vlmprune.policies.base import Needs, TokenContext
from vlmprune.testing.context import make_context
from vlmprune.testing.context_changes import halved, repeated

WIDE, TALL, FLAT = (4, 5), (5, 4), (2, 10)
"""Of as many tokens each, as a vision tower gives them."""

Settings = dict[str, dict[str, Any]]
"""By name what ``make_context`` is told, and under "then" what is done to the context."""

SITUATIONS: Settings = {
    "one image": {"images": [[WIDE]]},
    "one token": {"images": [[(1, 1)]]},
    "one row": {"images": [[(1, 7)]]},
    "several images": {"images": [[WIDE, TALL, FLAT]]},
    "a padded batch": {"images": [[WIDE, TALL], [], [FLAT]]},
    "no visual tokens": {"images": [[], []]},
    "a cached past": {"images": [[], [WIDE]], "past": True},
    "a long text before the image": {"images": [[WIDE]], "before": 64},
    "no text after the image": {"images": [[WIDE]], "after": [0]},
    "no text after one sample's image": {"images": [[WIDE], [TALL]], "after": [0, 5]},
    "few distinct values": {
        "images": [[WIDE], [TALL]],
        "few_values": True,
        "then": lambda ctx: repeated(ctx, 3),
    },
    "all values equal": {"images": [[WIDE]], "few_values": True, "then": lambda ctx: repeated(ctx, 1)},
    "in float16": {"images": [[WIDE]], "then": lambda ctx: halved(ctx, torch.float16)},
    "in bfloat16": {"images": [[WIDE]], "then": lambda ctx: halved(ctx, torch.bfloat16)},
}
WITHOUT_TOWER: Settings = {
    "images of unequal size": {"images": [[(4, 5), (3, 3)], [(1, 1)]]},
    "a small view and tiles": {
        "images": [[(2, 2), (4, 5), (1, 1)]],
        "then": lambda ctx: replace(ctx, sizes=(ctx.counts,)),
    },
}
WITH_TOWER: Settings = {
    "a tower without CLS": {"images": [[WIDE], [TALL, FLAT]], "cls": False},
    "several patches a token": {"images": [[WIDE, WIDE]], "cls": False, "side": 2},
}
LATER: Settings = {
    "after an earlier stage": {"images": [[WIDE, TALL], [FLAT]], "kept": [[1, 6, 33], [0, 1, 2, 9, 19]]},
}
CHUNKED: Settings = {
    "half an image, as prefill in chunks has it": {
        "images": [[WIDE]],
        "kept": [range(10, 20)],
        "then": lambda ctx: replace(ctx, shares=(0.5,)),
    },
}


def situations(needs: Needs, layer: int) -> Iterator[tuple[str, TokenContext]]:
    """Name and context of each situation that a stage with these needs can meet."""
    # what reads those refuses prefill in chunks
    whole = needs.vision or needs.reads_text or needs.tokens
    every = SITUATIONS | (WITH_TOWER if needs.vision else WITHOUT_TOWER)
    if layer:
        # who brings tokens back sees all of them
        every |= ({} if needs.restored else LATER) | ({} if whole else CHUNKED)
    for name, settings in every.items():
        if needs.tokens and 0 in settings.get("after", ()):
            continue  # who reads what is asked may refuse a prompt that asks nothing
        told = {key: value for key, value in settings.items() if key != "then"}
        ctx = make_context(needs, layer=layer, **told)
        yield name, settings["then"](ctx) if "then" in settings else ctx
