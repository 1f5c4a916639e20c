"""The hooks that prune one model instance while it runs.

Data flow of a prefill: base-model pre-hook (which positions are visual) -> self-attention hook of the layer before a
stage (query and keys) -> decoder-layer pre-hook at the stage (policy selects, rows are gathered) -> pre-hooks of the
layers after it (rotary tables and masks of the shortened sequence) -> text-model hook (rows scattered back).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from vlmprune import ops
from vlmprune.errors import NotPrunedError, check
from vlmprune.models.calls import image_token_count, padding_mask, visual_mask
from vlmprune.models.family import Parts, check_layers
from vlmprune.models.forward import Forward, Plan, scatter_back
from vlmprune.models.kv_cache import extend_validity, make_prunable, past_validity, pruned_layer
from vlmprune.models.layout import Layout, keep_newest, kept_counts, shorten
from vlmprune.models.masks import pruned_mask
from vlmprune.models.probe import read_attention
from vlmprune.models.run import Run
from vlmprune.policies.base import Needs, PruningPolicy, TokenContext

Kwargs = dict[str, Any]


class Engine:
    """Attaches a policy to one model. Run state lives in ``Forward`` objects; the engine keeps the latest run's record."""

    def __init__(self, parts: Parts, policy: PruningPolicy | None) -> None:
        self.parts, self.policy = parts, policy
        self.stages = policy.layers if policy is not None else ()
        if policy is not None:
            check_layers(policy, len(parts.layers))
        self.depth = {id(layer): i for i, layer in enumerate(parts.layers)}
        self.run = Run(parts, policy)
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
        if not self.stages:
            return
        read = [layer for layer in self.stages if self._needs(layer).attention is not None]
        for layer in read:
            attn = parts.layers[layer - 1].self_attn
            add(attn.register_forward_hook(self.after_attention, with_kwargs=True))
        for module in parts.layers[min([*self.stages, *(layer - 1 for layer in read)]) :]:
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
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        some = ids if ids is not None else embeds
        if some is None:
            return args, kwargs  # the model itself explains what is missing
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        forward = Forward(owner=self, q=some.shape[1])
        forward.known = image_token_count(kwargs, self.parts.grid)
        if forward.q > 1:
            forward.seen = padding_mask(kwargs.get("attention_mask"))
        if forward.known is not None:
            forward.visual = visual_mask(self.parts, ids, embeds)
        elif ids is None and past == 0 and self.stages:
            self.missed = (
                self.missed or "inputs_embeds came without input_ids or images: no way to find visual tokens"
            )
        if forward.visual is not None or past == 0:
            self.run.begin(some.shape[0], forward.q, forward.visual, kwargs.get("use_cache") is not False)
        return args, {**kwargs, "vlmprune": forward}

    @torch.no_grad()  # recorded operations would differ when a checkpointed layer is replayed
    def after_attention(self, module: Any, args: Any, kwargs: Kwargs, output: Any) -> None:
        """Read the query rows and keys that the next layer's stage will score with."""
        forward = self._forward(kwargs)
        stage = module.layer_idx + 1
        if forward is None or forward.visual is None or stage in forward.plans:
            return
        with self.run.clock.selection():
            layout = forward.layout_before(stage)
            forward.attention[stage] = read_attention(
                module, kwargs, layout, forward.seen, self._needs(stage)
            )

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
        if forward.visual is not None:
            forward.open(kwargs.get("attention_mask"))
            if i in self.stages:
                hidden = self._stage(forward, i, hidden, kwargs["position_embeddings"])
        cache = kwargs.get("past_key_values")
        plan, layer = forward.plan_at(i), pruned_layer(cache, i)
        if plan is None and (layer is None or (kwargs.get("attention_mask") is None and layer.valid is None)):
            return None  # nothing was dropped here, or nothing needs a mask: batch 1 decodes at no cost
        kwargs = {**kwargs, "position_ids": None}  # FlashAttention reads gaps in them as packed sequences
        if plan is not None:
            kwargs["position_embeddings"] = plan.rope
        kwargs["attention_mask"] = self._mask(forward, plan, hidden, cache, i)
        return (hidden, *args[1:]), kwargs

    def after_text(self, module: nn.Module, args: Any, kwargs: Kwargs, output: Any) -> Any:
        """Scatter the final hidden states back to the prompt's length, so logits, labels and slicing still fit."""
        forward = self._forward(kwargs)
        if forward is None or forward.visual is None:
            return output
        silent = [layer for layer in self.stages if layer not in forward.plans]
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

    def _needs(self, layer: int) -> Needs:
        assert self.policy is not None
        return self.policy.needs(layer)

    def _stage(self, forward: Forward, i: int, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Decide once which rows survive into layer ``i``, and gather them (again, if the layer is replayed)."""
        with self.run.clock.selection():
            if i in forward.plans:
                plan = forward.plans[i]
                return hidden if plan is None else ops.gather_tokens([hidden], plan.survivors)[0]
            before, layout = forward.plan_before(i), forward.layout_before(i)
            with torch.no_grad():
                index = self._select(forward, i, hidden, layout)
                kept = kept_counts(index)
                index = keep_newest(layout, index, kept)
                if kept == layout.counts:
                    forward.plans[i] = None
                    self.run.record(i, layout, index, layout.rows)
                    return hidden
                after, survivors = shorten(layout, index, kept)
                self.run.record(i, layout, index, after.rows)
            rope = rope if before is None else before.rope
            short, cos, sin = ops.gather_tokens([hidden, *rope], survivors)
            forward.plans[i] = Plan(after, survivors, (cos, sin))
            return short

    def _select(self, forward: Forward, i: int, hidden: Tensor, layout: Layout) -> Tensor:
        """Ask the policy which of the entering visual tokens stay."""
        assert self.policy is not None and forward.first is not None
        per_image = self.parts.grid[0] * self.parts.grid[1]
        context = TokenContext(
            layer=i,
            mask=layout.columns >= 0,
            counts=layout.counts,
            ordinals=layout.ordinals,
            positions=layout.positions(),
            grids=tuple((self.parts.grid,) * (n // per_image) for n in forward.first.counts),
            hidden=ops.gather_tokens([hidden], layout.columns)[0] if self._needs(i).hidden else None,
            attention=forward.attention.pop(i, None),
        )
        index = self.policy.select(context)
        shape = (len(layout.counts), "K")
        ok = index.ndim == 2 and index.shape[0] == shape[0] and index.dtype == torch.int64
        check(
            ok, "select", f"int64 [{shape[0]}, K] from {self.policy!r}", f"{index.dtype} {tuple(index.shape)}"
        )
        return index

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
            forward.masks[key] = (
                valid,
                mask,
                known,
            )  # known: kept alive, so that no other tensor can take its id
        valid, mask, _ = forward.masks[key]
        if layer is not None:
            layer.announce(valid, forward.q - rows)
        return mask
