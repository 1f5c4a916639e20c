"""Runs of the tiny families: greedy generation, the masking oracle for whatever inputs a family takes, and a reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import tiny
from helpers.families import IMAGE, STEPS, VIDEO
from helpers.tiny import masked
from vlmprune.policies.base import Needs, PruningPolicy, TokenContext

TOLERANCE = 1e-4  # absolute, on float32 logits of order 10
LAST_BUT_ONE = Needs(vision=(-2,))


@torch.no_grad()
def generate(model, inputs, **kwargs):
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=[IMAGE, VIDEO],
        **kwargs,
    )
    return out.sequences[:, -STEPS:], torch.stack(out.logits, 1)


@torch.no_grad()
def oracle(model, inputs, dropped):
    """Greedy decoding by full recomputation with the dropped columns masked."""
    inputs, tokens, logits = dict(inputs), [], []
    three = "mm_token_type_ids" in inputs  # such a model makes its own positions
    with masked(model, dropped):
        for _ in range(STEPS):
            real = inputs["attention_mask"]
            positions = {} if three else {"position_ids": (real.long().cumsum(-1) - 1).clamp(min=0)}
            last = model(**inputs, **positions, use_cache=False).logits[:, -1]
            choice = last.clone()
            choice[:, [IMAGE, VIDEO]] = float("-inf")
            tokens.append(choice.argmax(-1))
            logits.append(last)
            for name, new in (
                ("input_ids", tokens[-1][:, None]),
                ("attention_mask", torch.ones_like(real[:, :1])),
                ("mm_token_type_ids", torch.zeros_like(real[:, :1]).int()),
            ):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], new], 1)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def dropped_from(run, inputs):
    return tiny.dropped_from(run, inputs, (IMAGE, VIDEO))


@dataclass(frozen=True)
class Reader(PruningPolicy):
    """Reads what it is told to, and keeps every token."""

    see: Callable[[TokenContext], None]
    wants: Needs = LAST_BUT_ONE
    at: int = 3

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.at,)

    def needs(self, layer: int) -> Needs:
        return self.wants

    def select(self, ctx: TokenContext) -> Tensor:
        self.see(ctx)
        return ctx.ordinals
