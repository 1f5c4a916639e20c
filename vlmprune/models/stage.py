"""What happens at one stage: show the policy its context, turn its choice into a decision, apply the decision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import ModelError
from vlmprune.models.choice import settle
from vlmprune.models.decoder_reads import read_own_attention
from vlmprune.models.host.parts import Parts
from vlmprune.models.layout import (
    Layout,
    ascending,
    moved,
    packed_rows,
    put,
    rearrange,
    shorten,
    text_rows,
)
from vlmprune.models.prefill import Decision, Prefill, Rope
from vlmprune.models.vision_reads import VisionReads
from vlmprune.policies.answer import check_selection
from vlmprune.policies.base import PruningPolicy, Reduction, TokenContext


class StageRunner:
    """Runs the stages of one policy on one model."""

    def __init__(self, parts: Parts, policy: PruningPolicy, vision: VisionReads) -> None:
        self.parts, self.policy, self.vision = parts, policy, vision
        self.checked: set[int] = set()

    def __call__(self, prefill: Prefill, i: int, hidden: Tensor, rope: Rope) -> Tensor:
        """Decide once which rows of ``hidden [B, n, D]`` survive into layer ``i``; apply it, again if that is replayed.

        ``rope`` has the tables of the unpruned chunk.
        """
        assert prefill.prompt is not None and prefill.unpruned is not None
        if i in prefill.decisions:
            made = prefill.decisions[i]
            return hidden if made is None else _apply(made, hidden)
        before, layout = prefill.decision(i), moved(prefill.layout(i), hidden.device)
        rope = moved(rope, hidden.device)
        tables = rope if before is None else moved(before.rope, hidden.device)
        with torch.no_grad():
            context = self._context(prefill, i, hidden, tables, layout)
            choice = self.policy.select(context)
            self._check(choice, context, hidden)
            choice, kept = settle(layout, choice, hidden, prefill.call.predicting)
            numbers = ascending(choice.index) if isinstance(choice, Reduction) else choice
            if kept == layout.counts and not isinstance(choice, Reduction):
                prefill.decisions[i] = None
                prefill.prompt.record(i, layout, numbers, layout)
                return hidden
            _check_end(prefill, prefill.unpruned.layout)
            after, survivors = shorten(layout, numbers, kept)
            prefill.prompt.record(i, layout, numbers, after)
        shift = None if before is None else before.shift
        if isinstance(choice, Reduction):
            after, survivors = rearrange(layout, after, survivors, choice.index)
            rows = survivors
            if choice.positions == "pack":
                tables, first = rope, moved(prefill.unpruned.layout, hidden.device)
                rows = packed_rows(first, after)
                shift = tuple(a - b for a, b in zip(first.real, after.real, strict=True))
            cos, sin = ops.gather_tokens([*tables], rows)
            prefill.decisions[i] = made = Decision(after, survivors, (cos, sin), shift, choice.hidden)
            return _apply(made, hidden)
        short, cos, sin = ops.gather_tokens([hidden, *tables], survivors)  # one launch
        # detached: else checkpointed layers would share a graph through them
        prefill.decisions[i] = Decision(after, survivors, (cos.detach(), sin.detach()), shift)
        return short

    def _check(self, choice: Tensor | Reduction, context: TokenContext, hidden: Tensor) -> None:
        """Refuse a choice that means nothing. The first one at each layer is read in full: one host read."""
        layer = context.layer
        if layer not in self.checked and not hidden.is_meta:  # tensors without values have none to check
            check_selection(choice, context, repr(self.policy), hidden)
            self.checked.add(layer)
        packed = isinstance(choice, Reduction) and choice.positions == "pack"
        if packed and not self.parts.family.packs:
            raise ModelError(
                f"positions: expected 'keep' with {self.parts.config.model_type!r} (its positions have three "
                f"dimensions and cannot be packed), got 'pack' from {self.policy!r}"
            )

    def _context(self, prefill: Prefill, i: int, hidden: Tensor, rope: Rope, layout: Layout) -> TokenContext:
        """Everything the policy asked for, and where the visual tokens are; all of it where ``hidden`` is."""
        needs, unpruned = prefill.wants.needs[i], prefill.unpruned
        assert unpruned is not None
        attention = prefill.attention.pop(i, None)  # of the layer before, read when it ran
        if needs.attention == "own":
            attention = read_own_attention(self.parts.layers[i], hidden, rope, layout, prefill, needs)
        vision: dict[str, Any] = {}
        if needs.vision:
            assert prefill.call.visuals is not None
            vision = self.vision.fields(needs.vision, prefill.call.visuals, [*map(len, unpruned.images)])
        context = TokenContext(
            layer=i,
            mask=layout.visual >= 0,
            counts=layout.counts,
            ordinals=layout.ordinals,
            positions=layout.positions(),
            grids=tuple(tuple(grid for image in sample for grid in image) for sample in unpruned.images),
            sizes=unpruned.sizes(),
            shares=unpruned.shares,
            hidden=ops.gather_tokens([hidden], layout.visual)[0] if needs.hidden else None,
            attention=attention,
            embeds=unpruned.embeds if needs.embeds else None,
            image=unpruned.layout.visual if needs.embeds else None,
            text=None if unpruned.text is None else text_rows(unpruned.layout, unpruned.text),
            **vision,
        )
        return moved(context, hidden.device)


def _check_end(prefill: Prefill, first: Layout) -> None:
    """Raise ModelError where generation would go on from a padding row: once pruned, there is nothing in it."""
    if prefill.call.logits and first.trailing:
        raise ModelError(
            "attention_mask: expected padding on the left, as generation goes on from the last row "
            "(tokenizer.padding_side = 'left'), got a sample that ends in padding"
        )


def _apply(made: Decision, hidden: Tensor) -> Tensor:
    """The rows that survive, with new contents where the policy made some."""
    short = ops.gather_tokens([hidden], made.survivors)[0]
    return short if made.contents is None else put(short, made.layout.visual, made.contents)
