"""One call of the model on its way through the layers: what it brought, what its stages decided, what layers share.

It travels as a keyword argument from the base model to the decoder layers. Not on the model, not in a global: so two
threads, replayed layers (gradient checkpointing) and re-entrant calls each see their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.errors import ModelError
from vlmprune.models.call import Call
from vlmprune.models.crop_reads import Seen
from vlmprune.models.host.cache_view import pruned_layer
from vlmprune.models.host.families import DECODERS
from vlmprune.models.host.views import crop_grid, image_tokens
from vlmprune.models.layout import Layout, moved, open_layout, packed_rows, spread, take
from vlmprune.models.prompt import Prompt
from vlmprune.models.text_span import find_text
from vlmprune.models.unpruned import Unpruned
from vlmprune.models.waves import Waves
from vlmprune.policies.base import AttentionInputs, Insertion, Needs

RUNNING = "vlmprune"
"""Keyword that carries the running call to the layers."""
Rope = tuple[Tensor, Tensor]
"""cos and sin tables, each ``[B or 1, rows, D]``."""


@dataclass(frozen=True)
class Wants:
    """What a policy reads of a model, asked once for all calls.

    Attributes:
        needs: by stage layer.
        scored: self-attention modules of the layers that a following stage scores from.
        embeds: whether some stage reads the input embeddings.
        text: whether some stage reads the prompt's text.
        heads: query heads of every layer, those of all ranks.
        restores: the last stage that brings back what others have set aside; -1 = there is none.
        wave_layer: the stage before which a second wave runs (``Needs.wave``); -1 = there is none.
        normed: whether the layers normalize query and key behind their projections.
    """

    needs: Mapping[int, Needs]
    scored: frozenset[nn.Module]
    embeds: bool
    text: bool
    heads: int
    restores: int
    wave_layer: int
    normed: bool

    @classmethod
    def of(cls, needs: Mapping[int, Needs], layers: list[Any], config: Any) -> Wants:
        """Those of a policy with these needs, on a model with these decoder layers and this text configuration."""
        scored = [layer - 1 for layer, need in needs.items() if need.attention == "previous"]
        embeds = any(need.embeds for need in needs.values())
        text = any(need.reads_text or need.tokens for need in needs.values())
        attns = frozenset(layers[layer].self_attn for layer in scored)
        restores = max((layer for layer, need in needs.items() if need.restored), default=-1)
        wave_layer = max((layer for layer, need in needs.items() if need.wave), default=-1)
        normed = DECODERS[config.model_type].normed
        return cls(needs, attns, embeds, text, config.num_attention_heads, restores, wave_layer, normed)


class Decision(NamedTuple):
    """What one stage decided: made once, then only read (layers may be replayed).

    Attributes:
        layout: the rows after the stage.
        survivors: ``[B, n]`` rows of the previous layout that stay, -1 = padding.
        rope: the surviving rows' cos and sin, each ``[B, n, D]``.
        shift: by how much the positions after the prompt move down per sample, where they were packed; else None.
        contents: ``[B, K, D]`` new contents of the visual rows, or None.
        joined: ``[B, C]`` the rows of texts that join the prompts, -1 = padding, or None.
        inserted: these texts.
        weights: ``[B, n]`` float32 how many tokens each row stands for, in whose place it is attended to (``rectify=True``),
            or None.
        merged: ``[B, N]`` the number of the token in whose place each that entered was merged, -1 = in none; None = unknown.
    """

    layout: Layout
    survivors: Tensor
    rope: Rope
    shift: tuple[int, ...] | None = None
    contents: Tensor | None = None
    joined: Tensor | None = None
    inserted: Insertion | None = None
    weights: Tensor | None = None
    merged: Tensor | None = None


class Entering(NamedTuple):
    """What enters a stage, all on the device of its rows.

    Attributes:
        layer: the stage's.
        layout, hidden, rope: the rows ``[B, n, D]``, and their cos and sin.
        first, first_rope: layout, cos and sin of the unpruned chunk, to which packed positions go back.
        shift: of the latest decision.
        predicting: ``[B, q]`` True at positions from which a label is predicted, or None.
        places: ``[B or 1, q]`` int64 rotary positions of the unpruned chunk, where they have one dimension.
    """

    layer: int
    layout: Layout
    hidden: Tensor
    rope: Rope
    first: Layout
    first_rope: Rope
    shift: tuple[int, ...] | None
    predicting: Tensor | None
    places: Tensor | None = None

    def packed(self, after: Layout) -> tuple[Rope, tuple[int, ...]]:
        """cos and sin of the rows ``after`` the stage at 0, 1, 2, ... without gaps; by how much later positions move down."""
        shift = tuple(a - b for a, b in zip(self.first.real, after.real, strict=True))
        if self.first.valid is None and after.valid is None:
            cos, sin = (t[:, : after.length] for t in self.first_rope)
        else:
            cos, sin = ops.gather_tokens([*self.first_rope], packed_rows(self.first, after))
        return (cos, sin), shift


@dataclass
class Prefill:
    """A running call. (A decode step is one of a single row, in which nothing is decided.)

    Attributes:
        wants: what the policy reads; by this an engine knows the calls it has begun itself.
        call: what came.
        prompt: what the call is a chunk of; None for a decode step.
        cache: the cache its decoder layers got, known when the first of them runs.
        unpruned: the chunk before any stage, known when the first layer runs.
        decisions: by stage layer; None for a stage that kept everything.
        attention: query and key, by the stage layer that will read them.
        earlier: ``[B, n, D]`` rows that entered the layer before, by the stage layer that will read them.
        lse: ``[B, H, n]`` log-sum-exp of their rows, by layer, where our attention backend ran them.
        ropes: shifts of packed caches, each with its tables.
        masks: built masks, shared by the layers that need the same one.
        runner: what runs its stages, if that is not the engine's own: of a prefill that a graph captures.
        places: ``[B or 1, q]`` int64 rotary positions of its rows, behind those of a packed cache; None = not known.
        planes: ``[M, D]`` each, the features of all samples' visual tokens, one sample behind the other, that are added to
            those entering layers 1, 2, ... (Qwen3-VL's text model would add them to unpruned rows).
        aside: ``[B, q, D]`` all rows with the hidden states that those have which a later stage brings back; None = none does.
        waves: what stands in for the cache until the second wave has run; None = there is none.
    """

    wants: Wants
    call: Call
    prompt: Prompt | None = None
    cache: Any = None
    unpruned: Unpruned | None = None
    decisions: dict[int, Decision | None] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    earlier: dict[int, Tensor] = field(default_factory=dict)
    lse: dict[int, Tensor] = field(default_factory=dict)
    ropes: list[tuple[Tensor, Rope]] = field(default_factory=list)
    masks: dict[Any, Any] = field(default_factory=dict)
    runner: Any = None
    places: Tensor | None = None
    planes: tuple[Tensor, ...] = ()
    aside: Tensor | None = None
    waves: Waves | None = None

    @property
    def second(self) -> bool:
        """Whether the second wave is under way, whose layers are told everything by who runs it."""
        return self.waves is not None and self.waves.order is not None

    @property
    def bound(self) -> bool:
        """Whether its rows are padded on the right, by how many only the device knows: in a captured prefill."""
        return self.unpruned is not None and self.unpruned.layout.bound

    def scores_from(self, module: Any) -> bool:
        """Whether a stage still to come scores from this module's attention in this call."""
        here = self.call.visual is not None and module in self.wants.scored and not self.second
        return here and module.layer_idx + 1 not in self.decisions

    def keep_earlier(self, i: int, hidden: Tensor) -> None:
        """Keep the rows ``hidden [B, n, D]`` that enter layer ``i`` for a stage still to come at the next one, if it reads them."""
        needs = self.wants.needs.get(i + 1)
        if needs is not None and needs.earlier and i + 1 not in self.decisions:
            self.earlier[i + 1] = hidden

    def rectified(self, i: int) -> bool:
        """Whether some key that layer ``i``, which has run, holds stands for others."""
        decided, layer = self.decision(i), pruned_layer(self.cache, i)
        here = decided is not None and decided.weights is not None
        return here or (layer is not None and layer.bias is not None)

    @property
    def reach(self) -> int:
        """How many of the last rows the text after the last image is among: words that joined the prompt lie there, too."""
        assert self.unpruned is not None and self.unpruned.text is not None
        joined = None if self.prompt is None else self.prompt.inserted
        return self.unpruned.text.reach + (0 if joined is None else joined.hidden.shape[1])

    def open(self, attention_mask: object, hidden: Tensor) -> None:
        """The chunk before any stage, described when its first layer runs on rows ``hidden [B, q, D]``.

        A mask of None there means that transformers found no padding: nothing to ask the device for.
        """
        if self.unpruned is not None:
            return
        if attention_mask is None:
            self.call = replace(self.call, mask=None)
        call, prompt, wants = self.call, self.prompt, self.wants
        assert call.visual is not None and call.visuals is not None and prompt is not None
        layout = open_layout(call.visual, call.padding(), call.visuals.tokens(), call.tail)
        before = prompt.count(layout.counts)
        if call.visuals.cut:
            self.unpruned = _part(call, layout, before, wants)
        else:
            videos = None if call.videos is None else take(call.videos.long(), layout.visual).tolist()
            parts, seen = call.visuals.parts, call.visuals.by_sample(layout.counts, videos)
            patches = crop_grid(parts.config) if parts.family.tiles else None
            text = find_text(call.visual, layout.prompt()) if wants.text else None
            self.unpruned = Unpruned(layout, seen, None, text, hidden if wants.embeds else None, patches)

    def deepened(self, i: int, hidden: Tensor, layout: Layout | None = None) -> Tensor:
        """Rows ``hidden [B, n, D]`` that enter layer ``i``, each visual token's with its features of the plane added.

        They are those of ``layout``; None = the ones that layer i - 1 has run.
        """
        if not 0 < i <= len(self.planes):
            return hidden
        assert self.unpruned is not None
        # those before a stage at i, also where that was made before: the layer may be replayed
        layout = moved(self.layout(i - 1) if layout is None else layout, hidden.device)
        if not any(layout.counts):
            return hidden
        numbers, counts = layout.ordinals, self.unpruned.layout.counts
        if len(counts) > 1:
            begins = whole_numbers((0, *accumulate(counts[:-1])), hidden.device)[:, None]
            numbers = torch.where(layout.mask, numbers + begins, -1)
        plane = self.planes[i - 1].to(hidden)
        added = ops.gather_tokens([plane[None]], numbers.view(1, -1))[0].view(*numbers.shape, -1)
        return hidden + spread(layout.visual, added, layout.length)

    def decision(self, i: int) -> Decision | None:
        """What layer ``i`` runs under: the latest decision made at it or before it."""
        latest, found = -1, None
        for layer, decided in self.decisions.items():
            if latest < layer <= i and decided is not None:
                latest, found = layer, decided
        return found

    def entering(self, i: int, hidden: Tensor, rope: Rope) -> Entering:
        """What enters the stage at layer ``i``; ``rope`` has the tables of the unpruned chunk."""
        assert self.unpruned is not None
        before, device, predicting = self.decision(i), hidden.device, self.call.predicting
        first = moved(self.unpruned.layout, device)
        tables = rope if rope[0].device == device else moved(rope, device)
        if before is None:
            places = None if self.places is None else self.places.to(device)
            return Entering(i, first, hidden, tables, first, tables, None, predicting, places)
        layout, own = moved(before.layout, device), moved(before.rope, device)
        return Entering(i, layout, hidden, own, first, tables, before.shift, predicting)

    def layout(self, i: int) -> Layout:
        """The rows in layer ``i``."""
        decided = self.decision(i)
        if decided is not None:
            return decided.layout
        assert self.unpruned is not None
        return self.unpruned.layout


def _part(call: Call, layout: Layout, before: tuple[int, ...], wants: Wants) -> Unpruned:
    """A chunk of a prompt: its ordinals count from the prompt's first one on, so that parts of an image find their place."""
    assert call.visuals is not None
    if wants.text:
        raise ModelError(
            "prefill_chunk_size: expected None with a method that reads the prompt's text, got a prompt in chunks"
        )
    images = call.visuals.in_chunks([a + b for a, b in zip(before, layout.counts, strict=True)])
    grids = [image_tokens(sample[0]) if sample else 1 for sample in images]
    shares = tuple(n / size for n, size in zip(layout.counts, grids, strict=True))
    start = whole_numbers(before, layout.visual.device)[:, None]
    seen = Seen(images, tuple((0,) * len(sample) for sample in images))
    return Unpruned(replace(layout, first=start), seen, shares)
