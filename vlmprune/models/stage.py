"""What happens at one stage: show the policy its context, turn its choice into a plan, apply the plan."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import ModelError
from vlmprune.models.choice import settle
from vlmprune.models.family import Parts
from vlmprune.models.forward import Forward, Plan, Rope
from vlmprune.models.layout import (
    Layout,
    ascending,
    moved,
    packed_rows,
    put_rows,
    rearrange,
    shorten,
    text_rows,
)
from vlmprune.models.probe import read_own_attention
from vlmprune.models.vision import VisionTaps
from vlmprune.policies.answer import check_selection
from vlmprune.policies.base import AttentionInputs, PruningPolicy, Reduction, TokenContext


class StageRunner:
    """Runs the stages of one policy on one model."""

    def __init__(self, parts: Parts, policy: PruningPolicy, taps: VisionTaps) -> None:
        self.parts, self.policy, self.taps = parts, policy, taps
        self.checked: set[int] = set()

    def __call__(self, forward: Forward, i: int, hidden: Tensor, rope: Rope) -> Tensor:
        """Decide once which rows survive into layer ``i``, and apply it (again, if the layer is replayed).

        Args:
            forward: the running call.
            i: the stage's layer.
            hidden: ``[B, n, D]`` rows entering it.
            rope: cos and sin of the unpruned chunk.
        """
        assert forward.prompt is not None  # whatever brings images is a prompt
        if i in forward.plans:
            plan = forward.plans[i]
            return hidden if plan is None else _apply(plan, hidden)
        device = hidden.device
        before, layout = forward.plan_before(i), moved(forward.layout_before(i), device)
        rope = rope[0].to(device), rope[1].to(device)
        tables = rope if before is None else (before.rope[0].to(device), before.rope[1].to(device))
        with torch.no_grad():
            choice = self._ask(self._context(forward, i, hidden, tables, layout), hidden)
            choice, kept = settle(layout, choice, hidden, forward.predicting)
            index = ascending(choice.index) if isinstance(choice, Reduction) else choice
            if kept == layout.counts and not isinstance(choice, Reduction):
                forward.plans[i] = None
                forward.prompt.record(i, layout, index, layout)
                return hidden
            self._check_end(forward)
            after, survivors = shorten(layout, index, kept)
            forward.prompt.record(i, layout, index, after)
        if isinstance(choice, Reduction):
            forward.plans[i] = plan = _reduced(forward, i, rope, tables, layout, after, survivors, choice)
            return _apply(plan, hidden)
        short, cos, sin = ops.gather_tokens([hidden, *tables], survivors)  # one launch
        rope = cos.detach(), sin.detach()  # else checkpointed layers would share a graph through them
        forward.plans[i] = Plan(after, survivors, rope, shift=None if before is None else before.shift)
        return short

    def _ask(self, context: TokenContext, hidden: Tensor) -> Tensor | Reduction:
        """The policy's choice; the first one at each layer is checked in full, which takes one host read."""
        choice = self.policy.select(context)
        if (
            context.layer not in self.checked and not hidden.is_meta
        ):  # tensors without values have none to check
            check_selection(choice, context, repr(self.policy), hidden)
            self.checked.add(context.layer)
        packed = isinstance(choice, Reduction) and choice.positions == "pack"
        if packed and not self.parts.family.packs:
            raise ModelError(
                f"positions: expected 'keep' with {self.parts.config.model_type!r} (its positions have three "
                f"dimensions and cannot be packed), got 'pack' from {self.policy!r}"
            )
        return choice

    def _check_end(self, forward: Forward) -> None:
        """Raise ModelError where generation would go on from a padding row: once pruned, there is nothing in it."""
        if forward.goes_on and forward.first is not None and forward.first.trailing:
            raise ModelError(
                "attention_mask: expected padding on the left, as generation goes on from the last row "
                "(tokenizer.padding_side = 'left'), got a sample that ends in padding"
            )

    def _context(self, forward: Forward, i: int, hidden: Tensor, rope: Rope, layout: Layout) -> TokenContext:
        """Everything the policy asked for, and where the visual tokens are; all of it where ``hidden`` is."""
        needs, visuals, device = self.policy.needs(i), forward.visuals, hidden.device
        assert forward.first is not None and visuals is not None
        first = moved(forward.first, device)
        images = [len(sample) for sample in forward.images]
        return TokenContext(
            layer=i,
            mask=layout.columns >= 0,
            counts=layout.counts,
            ordinals=layout.ordinals,
            positions=layout.positions(),
            grids=tuple(tuple(grid for image in sample for grid in image) for sample in forward.images),
            sizes=forward.sizes(),
            shares=forward.shares,
            hidden=ops.gather_tokens([hidden], layout.columns)[0] if needs.hidden else None,
            attention=self._attention(forward, i, hidden, rope, layout),
            embeds=forward.embeds.to(device) if needs.embeds and forward.embeds is not None else None,
            image=first.columns if needs.embeds else None,
            text=None if forward.text is None else text_rows(first, forward.text),
            vision={at: moved(self.taps.attention(at, visuals, images), device) for at in needs.vision},
            features=self.taps.features(visuals, images).to(device) if needs.vision else None,
            project=self.parts.projector.forward
            if needs.vision
            else None,  # not a call: no hook should see it
        )

    def _attention(
        self, forward: Forward, i: int, hidden: Tensor, rope: Rope, layout: Layout
    ) -> AttentionInputs | None:
        """Query and key of the layer before, read when it ran, or of this layer, projected now."""
        needs = self.policy.needs(i)
        if needs.attention != "own":
            return forward.attention.pop(i, None)
        layer = self.parts.layers[i]
        return moved(read_own_attention(layer, hidden, rope, layout, forward, needs), hidden.device)


def _reduced(
    forward: Forward,
    i: int,
    rope: Rope,
    tables: Rope,
    layout: Layout,
    after: Layout,
    survivors: Tensor,
    choice: Reduction,
) -> Plan:
    """The plan of a choice that reorders, rewrites or renumbers its rows."""
    before = forward.plan_before(i)
    assert forward.first is not None
    first = moved(forward.first, survivors.device)
    after, survivors = rearrange(layout, after, survivors, choice.index)
    if choice.positions == "pack":
        cos, sin = ops.gather_tokens(list(rope), packed_rows(first, after))
        shift = tuple(a - b for a, b in zip(first.real, after.real, strict=True))
        return Plan(after, survivors, (cos, sin), shift, choice.hidden)
    cos, sin = ops.gather_tokens(list(tables), survivors)
    return Plan(after, survivors, (cos, sin), None if before is None else before.shift, choice.hidden)


def _apply(plan: Plan, hidden: Tensor) -> Tensor:
    """The rows that survive, with new contents where the policy made some."""
    short = ops.gather_tokens([hidden], plan.survivors)[0]
    return short if plan.rows is None else put_rows(short, plan.layout.columns, plan.rows)
