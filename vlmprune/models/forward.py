"""The state of one forward pass. It travels as a keyword argument from the base model to the decoder layers.

Not on the model, not in a global: so two threads, replayed layers (gradient checkpointing) and re-entrant calls
each see their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import ModelError
from vlmprune.models.layout import Layout, TextSpan, find_text, open_layout
from vlmprune.policies.base import AttentionInputs

Rope = tuple[Tensor, Tensor]
"""cos and sin tables, each ``[B or 1, rows, D]``."""


@dataclass(frozen=True)
class Plan:
    """What one stage decided: made once, then only read (layers may be replayed).

    Attributes:
        layout: the rows after the stage.
        survivors: ``[B, n]`` rows of the previous layout that stay, -1 = padding.
        rope: the surviving rows' cos and sin, each ``[B, n, D]``.
        shift: by how much the positions after the prompt move down per sample, where they were packed; else None.
        rows: ``[B, K, D]`` new contents of the visual rows, or None.
    """

    layout: Layout
    survivors: Tensor
    rope: Rope
    shift: tuple[int, ...] | None = None
    rows: Tensor | None = None


@dataclass
class Forward:
    """One call of the model inside a pruning scope.

    Attributes:
        owner: the engine whose hooks made it.
        q: length of this call's chunk.
        per_image: visual tokens of one image.
        visual: ``[B, q]`` True at visual tokens, or None if this call brings no images.
        known: number of visual tokens this call brings, from the shape of the images; None without images.
        seen: ``[B, past + q]`` False at padding (the 2-D attention mask), or None.
        plans: by stage layer; None for a stage that kept everything.
        attention: query and key, by the stage layer that will read them.
        wants_text: whether a stage asks where the text after the last image is; ``text`` says it.
        embeds: ``[B, q, D]`` input embeddings, if a stage asks for them.
        ropes: tables of packed caches, by their shift.
        masks: built masks, shared by the layers that need the same one.
    """

    owner: object
    q: int
    per_image: int
    visual: Tensor | None = None
    known: int | None = None
    seen: Tensor | None = None
    first: Layout | None = None
    wants_text: bool = False
    text: TextSpan | None = None
    embeds: Tensor | None = None
    ropes: dict[Any, Any] = field(default_factory=dict)
    plans: dict[int, Plan | None] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    masks: dict[Any, Any] = field(default_factory=dict)

    def chunk_padding(self) -> Tensor | None:
        """``[B, q]`` False at padding of this chunk, or None."""
        return None if self.seen is None else self.seen[:, -self.q :]

    def open(self, attention_mask: object) -> Layout:
        """The unpruned layout, made when the first hooked layer runs.

        A mask of None there means that transformers found no padding: nothing to ask the device for.
        """
        if self.first is None:
            assert self.visual is not None
            if attention_mask is None:
                self.seen = None
            self.first = open_layout(self.visual, self.chunk_padding(), self.known)
            split = [n for n in self.first.counts if n % self.per_image]
            if split:
                raise ModelError(
                    f"prompt: expected whole images of {self.per_image} visual tokens in one call, got {split[0]} "
                    "visual tokens (chunked prefill cannot be pruned)"
                )
            if self.wants_text:
                self.text = find_text(self.visual, self.first.valid)
        return self.first

    def plan_before(self, i: int) -> Plan | None:
        """The plan layer ``i``'s input obeys before any stage at ``i`` itself."""
        made = [layer for layer, plan in self.plans.items() if layer < i and plan is not None]
        return self.plans[max(made)] if made else None

    def plan_at(self, i: int) -> Plan | None:
        """The plan layer ``i`` runs under."""
        made = [layer for layer, plan in self.plans.items() if layer <= i and plan is not None]
        return self.plans[max(made)] if made else None

    def layout_before(self, i: int) -> Layout:
        """The layout of the rows that enter layer ``i``."""
        plan = self.plan_before(i)
        if plan is not None:
            return plan.layout
        assert self.first is not None
        return self.first


def scatter_back(short: Tensor, origin: Tensor, q: int) -> Tensor:
    """Put rows ``[B, n, D]`` back where they came from in ``[B, q, D]``; pruned and padding rows are zeros."""
    batch, _, width = short.shape
    at = torch.where(origin >= 0, origin, q)[..., None].expand(-1, -1, width)
    return short.new_zeros(batch, q + 1, width).scatter(1, at, short)[:, :q]
