"""The state of one forward pass. It travels as a keyword argument from the base model to the decoder layers.

Not on the model, not in a global: so two threads, replayed layers (gradient checkpointing) and re-entrant calls
each see their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import ModelError
from vlmprune.models.calls import Visuals
from vlmprune.models.families import ImageGrids
from vlmprune.models.layout import Layout, TextSpan, find_text, open_layout, take
from vlmprune.models.prompt import Prompt
from vlmprune.policies.base import AttentionInputs, tokens_in

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
        past: tokens the cache had seen before it, on the host.
        given: the cache the call came with, or None.
        cache: the one its decoder layers got, known when the first of them runs.
        visual: ``[B, q]`` True at visual tokens, or None if this call brings no images.
        visuals: the images and videos this call brings; None without any.
        videos: ``[B, q]`` True at visual tokens of a video, where a call brings both kinds (one host read more).
        prompt: what this call is a chunk of; None for a decode step.
        images: the grids of each sample's images, known when the first hooked layer runs; in a chunk those of the whole
            prompt so far.
        shares: how many images the visual tokens of each sample are, where chunked prefill cut them up; else None.
        tail: candidates of assisted decoding that stand behind the prompt.
        goes_on: whether only logits of the last rows are asked for, as generate() does.
        predicting: ``[B, q]`` True at rows from which a label is predicted; None outside training.
        seen: ``[B, past + q]`` False at padding (the 2-D attention mask), or None.
        plans: by stage layer; None for a stage that kept everything.
        scored: self-attention modules that a stage scores from.
        lse: ``[B, H, n]`` log-sum-exp of their rows, by layer, where our attention backend ran them.
        attention: query and key, by the stage layer that will read them.
        wants_text: whether a stage asks where the text after the last image is; ``text`` says it.
        embeds: ``[B, q, D]`` input embeddings, if a stage asks for them.
        ropes: shifts of packed caches, each with its tables.
        masks: built masks, shared by the layers that need the same one.
    """

    owner: object
    q: int
    past: int = 0
    given: Any = None
    cache: Any = None
    visual: Tensor | None = None
    visuals: Visuals | None = None
    videos: Tensor | None = None
    prompt: Prompt | None = None
    images: tuple[tuple[ImageGrids, ...], ...] = ()
    shares: tuple[float, ...] | None = None
    tail: int = 0
    goes_on: bool = False
    predicting: Tensor | None = None
    seen: Tensor | None = None
    first: Layout | None = None
    wants_text: bool = False
    text: TextSpan | None = None
    embeds: Tensor | None = None
    ropes: list[tuple[Tensor, Rope]] = field(default_factory=list)
    plans: dict[int, Plan | None] = field(default_factory=dict)
    scored: frozenset[nn.Module] = frozenset()
    lse: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    masks: dict[Any, Any] = field(default_factory=dict)

    def scores_from(self, module: Any) -> bool:
        """Whether a stage still to come scores from this module's attention in this call."""
        return self.visual is not None and module in self.scored and module.layer_idx + 1 not in self.plans

    def chunk_padding(self) -> Tensor | None:
        """``[B, q]`` False at padding of this chunk, or None."""
        return None if self.seen is None else self.seen[:, -self.q :]

    def open(self, attention_mask: object) -> Layout:
        """The unpruned layout, made when the first hooked layer runs.

        A mask of None there means that transformers found no padding: nothing to ask the device for.
        """
        if self.first is None:
            assert self.visual is not None and self.visuals is not None and self.prompt is not None
            if attention_mask is None:
                self.seen = None
            self.first = open_layout(self.visual, self.chunk_padding(), self.visuals.tokens(), self.tail)
            videos = None if self.videos is None else take(self.videos.long(), self.first.columns).tolist()
            before = self.prompt.add(self.first.counts)
            if self.visuals.cut:
                self._open_chunk(self.first, before)
            else:
                self.images = self.visuals.by_sample(self.first.counts, videos)
            if self.wants_text:
                self.text = find_text(self.visual, self.first.prompt())
        return self.first

    def _open_chunk(self, first: Layout, before: tuple[int, ...]) -> None:
        """Count visual tokens from the prompt's first one on, so that parts of an image find their place in its grid."""
        assert self.visuals is not None and self.prompt is not None
        if self.wants_text:
            raise ModelError(
                "prefill_chunk_size: expected None with a method that reads the prompt's text, got a prompt in chunks"
            )
        self.images = self.visuals.in_chunks(self.prompt.seen)
        grids = [tokens_in(images[0]) if images else 1 for images in self.images]
        self.shares = tuple(n / size for n, size in zip(first.counts, grids, strict=True))
        start = torch.tensor(before).to(first.ordinals.device, non_blocking=True)[:, None]
        self.first = replace(first, ordinals=torch.where(first.ordinals >= 0, first.ordinals + start, -1))

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Visual tokens of each sample's images; of all their parts together, where they were cut up."""
        if self.shares is not None:
            assert self.first is not None
            return tuple((n,) for n in self.first.counts)
        return tuple(tuple(map(tokens_in, sample)) for sample in self.images)

    def plan_before(self, i: int) -> Plan | None:
        """The plan layer ``i``'s input obeys before any stage at ``i`` itself."""
        return self.plan_at(i - 1)

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
    origin = origin.to(short.device)
    at = torch.where(origin >= 0, origin, q)[..., None].expand(-1, -1, width)
    return short.new_zeros(batch, q + 1, width).scatter(1, at, short)[:, :q]
