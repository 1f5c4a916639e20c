"""The hooks that prune one model instance while it runs.

Data flow of a prefill: base-model pre-hook (which positions are visual) -> self-attention hook of the layer before a
stage (query and keys) -> decoder-layer pre-hook at the stage (policy selects, rows are gathered) -> pre-hooks of the
layers after it (rotary tables and masks of the shortened sequence) -> text-model hook (rows scattered back).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from vlmprune.errors import NotPrunedError
from vlmprune.models.calls import image_token_count, padding_mask, visual_mask
from vlmprune.models.family import Parts, check_layers
from vlmprune.models.forward import Forward, Plan, Rope, scatter_back
from vlmprune.models.kv_cache import (
    PrunedDynamicLayer,
    Shift,
    as_shift,
    extend_validity,
    make_prunable,
    past_validity,
    pruned_layer,
)
from vlmprune.models.masks import pruned_mask
from vlmprune.models.probe import read_attention
from vlmprune.models.run import Run
from vlmprune.models.stage import StageRunner
from vlmprune.models.vision import VisionTaps
from vlmprune.policies.base import Needs, PruningPolicy

Kwargs = dict[str, Any]


class Engine:
    """Attaches a policy to one model. Run state lives in ``Forward`` objects; the engine keeps the latest run's record."""

    def __init__(self, parts: Parts, policy: PruningPolicy | None) -> None:
        self.parts, self.policy = parts, policy
        self.depth = {id(layer): i for i, layer in enumerate(parts.layers)}
        self.names = list(inspect.signature(parts.base.forward).parameters)
        self.run = Run(parts, policy)
        self.needs: dict[int, Needs] = {}
        if policy is not None:
            check_layers(policy, len(parts.layers))
            self.needs = {layer: policy.needs(layer) for layer in policy.layers}
            vision = {layer for needs in self.needs.values() for layer in needs.vision}
            self.taps = VisionTaps(parts, sorted(vision))
            self.stage = StageRunner(parts, policy, self.run, self.taps)
        self.wants_embeds = any(needs.embeds for needs in self.needs.values())
        self.wants_text = self.wants_embeds or any(needs.rows == "text" for needs in self.needs.values())
        self.missed: str | None = None
        self.handles: list[RemovableHandle] = []

    # Attaching

    def attach(self) -> None:
        """Register the hooks; on an error none stays behind."""
        try:
            self._register()
        except BaseException:
            self.remove()
            raise

    def _register(self) -> None:
        parts, add = self.parts, self.handles.append
        add(parts.base.register_forward_pre_hook(self.enter_base, with_kwargs=True))
        for module, before, after in self.run.clock.hooks(parts):
            add(module.register_forward_pre_hook(before))
            add(module.register_forward_hook(after))
        if not self.needs:
            return
        self.handles += self.taps.register()
        read = [layer for layer, needs in self.needs.items() if needs.attention == "previous"]
        for layer in read:
            attn = parts.layers[layer - 1].self_attn
            add(attn.register_forward_hook(self.after_attention, with_kwargs=True))
        start = 0 if self.wants_embeds else min([*self.needs, *(layer - 1 for layer in read)])
        for module in parts.layers[start:]:
            add(module.register_forward_pre_hook(self.before_layer, with_kwargs=True))
        add(parts.text.register_forward_hook(self.after_text, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook off again."""
        tables = [(handle.id, handle.hooks_dict_ref()) for handle in self.handles]
        lost = sum(table is not None and key not in table for key, table in tables)
        if lost:
            self.missed = self.missed or f"{lost} of its hooks were removed by other code"
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def raise_if_missed(self) -> None:
        """Raise NotPrunedError if decoder layers ran without these hooks having their say."""
        if self.missed is not None:
            raise NotPrunedError(f"the model ran but was not pruned as asked: {self.missed}")

    # Hooks

    def enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, Kwargs]:
        """Note which positions of this call are visual tokens, and send the note along to the layers."""
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}  # whichever way the arguments came
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        some = ids if ids is not None else embeds
        if some is None:
            return args, kwargs  # the model itself explains what is missing
        cache = call.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        rows, columns = self.parts.grid
        forward = Forward(self, some.shape[1], rows * columns, wants_text=self.wants_text)
        forward.known = image_token_count(call, self.parts.grid)
        if forward.q > 1:
            forward.seen = padding_mask(call.get("attention_mask"))
        if forward.known is not None:
            forward.visual = visual_mask(self.parts, ids, embeds)
        elif ids is None and past == 0 and self.needs:
            self.missed = (
                self.missed or "inputs_embeds came without input_ids or images: no way to find visual tokens"
            )
        if forward.visual is not None or past == 0:
            self.run.begin(some.shape[0], forward.q, forward.visual, call.get("use_cache") is not False)
        return args, {**kwargs, "vlmprune": forward}

    @torch.no_grad()  # recorded operations would differ when a checkpointed layer is replayed
    def after_attention(self, module: Any, args: Any, kwargs: Kwargs, output: Any) -> None:
        """Read the query rows and keys that the next layer's stage will score with."""
        forward = self._forward(kwargs)
        stage = module.layer_idx + 1
        if forward is None or forward.visual is None or stage in forward.plans:
            return
        with self.run.clock.selection():
            forward.attention[stage] = read_attention(module, kwargs, forward, self.needs[stage])

    def before_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[Any, Kwargs] | None:
        """At a stage drop rows; at and after it hand the layer the tables, mask and cache of the short sequence."""
        i, forward, hidden = self.depth[id(module)], self._forward(kwargs), args[0]
        if forward is None:
            self.missed = (
                self.missed or "decoder layers were called without going through the vision-language model"
            )
            return None
        cache = kwargs.get("past_key_values")
        layer = pruned_layer(cache, i)
        shift = None if layer is None else layer.shift
        rope = (
            kwargs["position_embeddings"] if shift is None else self._shifted(forward, hidden, kwargs, shift)
        )
        if forward.visual is not None:
            forward.open(kwargs.get("attention_mask"))
            if i == 0 and self.wants_embeds:
                forward.embeds = hidden
            if i in self.needs:
                with self.run.clock.selection():
                    hidden = self.stage(forward, i, hidden, rope, cache)
        plan = forward.plan_at(i)
        if plan is None and shift is None and needs_nothing(layer, kwargs):
            return None
        kwargs = {**kwargs, "position_ids": None}  # FlashAttention reads gaps in them as packed sequences
        kwargs["position_embeddings"] = rope if plan is None else plan.rope
        kwargs["attention_mask"] = self._mask(forward, plan, hidden, cache, i)
        return (hidden, *args[1:]), kwargs

    def after_text(self, module: nn.Module, args: Any, kwargs: Kwargs, output: Any) -> Any:
        """Scatter the final hidden states back to the prompt's length, so logits, labels and slicing still fit."""
        forward = self._forward(kwargs)
        if forward is None or forward.visual is None:
            return output
        silent = [layer for layer in self.needs if layer not in forward.plans]
        if silent:
            self.missed = self.missed or f"the stage at layer {silent[0]} did not fire"
        plan = forward.plan_at(len(self.parts.layers))
        if plan is not None:
            assert plan.layout.origin is not None
            output.last_hidden_state = scatter_back(output.last_hidden_state, plan.layout.origin, forward.q)
        return output

    # Pieces

    def _forward(self, kwargs: Kwargs) -> Forward | None:
        """This engine's note about the running call; None if the call did not come through ``enter_base``."""
        forward = kwargs.get("vlmprune")
        return forward if forward is not None and forward.owner is self else None

    def _shifted(self, forward: Forward, hidden: Tensor, kwargs: Kwargs, shift: Shift) -> Rope:
        """Rotary tables of this chunk after a packed cache; layers with the same shift share them."""
        key = shift if isinstance(shift, int) else id(shift)
        if key not in forward.ropes:
            tables = self.parts.text.rotary_emb(hidden, kwargs["position_ids"] - shift)
            forward.ropes[key] = (tables, shift)  # the shift is kept alive, so that no other can take its id
        tables, _ = forward.ropes[key]
        return tables

    def _mask(self, forward: Forward, plan: Plan | None, hidden: Tensor, cache: Cache | None, i: int) -> Any:
        """Build the layer's mask and announce this chunk to its cache; layers that need the same share the work."""
        rows = hidden.shape[1]
        new = plan.layout.valid if plan is not None else forward.chunk_padding()
        old = past_validity(cache, i, forward.seen, forward.q)
        layer = None if cache is None else make_prunable(cache, i)
        past, dropped = (0, 0) if layer is None else (layer.stored(), layer.dropped)
        known = None if layer is None else layer.valid
        key = (past, dropped, id(plan), id(known))
        if key not in forward.masks:
            valid = extend_validity(old, past, new, rows)
            mask = pruned_mask(self.parts.text.config, hidden, valid, cache, dropped, i)
            moved = None if plan is None else as_shift(plan.shift, hidden.device)
            forward.masks[key] = (
                valid,
                mask,
                moved,
                known,
            )  # known: kept alive, so that its id stays its own
        valid, mask, moved, _ = forward.masks[key]
        if layer is not None:
            layer.announce(valid, forward.q - rows, moved)
        return mask


def needs_nothing(layer: PrunedDynamicLayer | None, kwargs: Kwargs) -> bool:
    """Whether a layer may run as it is: nothing was dropped, or what was needs no mask (batch 1 decodes at no cost)."""
    return layer is None or (kwargs.get("attention_mask") is None and layer.valid is None)
