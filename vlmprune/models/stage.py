"""What happens at one stage: show the policy its context, turn its choice into a plan, apply the plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import ModelError, check
from vlmprune.models.family import Parts
from vlmprune.models.forward import Forward, Plan, Rope
from vlmprune.models.layout import (
    Layout,
    in_order,
    moved,
    packed_rows,
    put_rows,
    rearrange,
    shorten,
    text_rows,
)
from vlmprune.models.probe import read_own_attention
from vlmprune.models.run import Run
from vlmprune.models.vision import VisionTaps
from vlmprune.policies.base import AttentionInputs, PruningPolicy, Reduction, TokenContext


class StageRunner:
    """Runs the stages of one policy on one model."""

    def __init__(self, parts: Parts, policy: PruningPolicy, run: Run, taps: VisionTaps) -> None:
        self.parts, self.policy, self.run, self.taps = parts, policy, run, taps

    def __call__(self, forward: Forward, i: int, hidden: Tensor, rope: Rope, cache: Any) -> Tensor:
        """Decide once which rows survive into layer ``i``, and apply it (again, if the layer is replayed).

        Args:
            forward: the running call.
            i: the stage's layer.
            hidden: ``[B, n, D]`` rows entering it.
            rope: cos and sin of the unpruned chunk.
            cache: the KV cache, or None.
        """
        if i in forward.plans:
            plan = forward.plans[i]
            return hidden if plan is None else _apply(plan, hidden)
        device = hidden.device
        before, layout = forward.plan_before(i), moved(forward.layout_before(i), device)
        rope = rope[0].to(device), rope[1].to(device)
        tables = rope if before is None else (before.rope[0].to(device), before.rope[1].to(device))
        with torch.no_grad():
            choice = self._ask(self._context(forward, i, hidden, tables, cache, layout))
            index, kept = in_order(layout, choice)
            if kept == layout.counts and not isinstance(choice, Reduction):
                forward.plans[i] = None
                self.run.record(i, layout, index, layout)
                return hidden
            after, survivors = shorten(layout, index, kept)
            self.run.record(i, layout, index, after)
        if isinstance(choice, Reduction):
            forward.plans[i] = plan = _reduced(forward, i, rope, tables, layout, after, survivors, choice)
            return _apply(plan, hidden)
        short, cos, sin = ops.gather_tokens([hidden, *tables], survivors)  # one launch
        rope = cos.detach(), sin.detach()  # else checkpointed layers would share a graph through them
        forward.plans[i] = Plan(after, survivors, rope, shift=None if before is None else before.shift)
        return short

    def _ask(self, context: TokenContext) -> Tensor | Reduction:
        """The policy's choice, checked for its form."""
        choice = self.policy.select(context)
        index = choice.index if isinstance(choice, Reduction) else choice
        batch = len(context.counts)
        ok = index.ndim == 2 and index.shape[0] == batch and index.dtype == torch.int64
        got = f"{index.dtype} {tuple(index.shape)}"
        check(ok, "select", f"int64 [{batch}, K] from {self.policy!r}", got)
        packed = isinstance(choice, Reduction) and choice.positions == "pack"
        if packed and not self.parts.family.packs:
            raise ModelError(
                f"positions: expected 'keep' with {self.parts.config.model_type!r} (its positions have three "
                f"dimensions and cannot be packed), got 'pack' from {self.policy!r}"
            )
        if isinstance(choice, Reduction) and choice.hidden is not None:
            shape = tuple(choice.hidden.shape)
            check(shape[:2] == tuple(index.shape), "select", f"hidden {[*index.shape]} + [D]", [*shape])
        return choice

    def _context(
        self, forward: Forward, i: int, hidden: Tensor, rope: Rope, cache: Any, layout: Layout
    ) -> TokenContext:
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
            attention=self._attention(forward, i, hidden, rope, cache, layout),
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
        self, forward: Forward, i: int, hidden: Tensor, rope: Rope, cache: Any, layout: Layout
    ) -> AttentionInputs | None:
        """Query and key of the layer before, read when it ran, or of this layer, projected now."""
        needs = self.policy.needs(i)
        if needs.attention != "own":
            return forward.attention.pop(i, None)
        layer = self.parts.layers[i]
        return moved(read_own_attention(layer, hidden, rope, cache, layout, forward, needs), hidden.device)


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
