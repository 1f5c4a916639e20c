"""The hooks that prune one model instance while it runs.

Data flow of a prefill: base-model pre-hook (which positions are visual) -> self-attention hook of the layer before a
stage (query and keys) -> decoder-layer pre-hook at the stage (policy selects, rows are gathered) -> pre-hooks of the
layers after it (rotary tables and masks of the shortened sequence) -> text-model hook (rows scattered back).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache

from vlmprune.errors import ModelError, NotPrunedError
from vlmprune.models.calls import brings_visuals, find_visuals, padding_mask
from vlmprune.models.compaction import compact_earlier
from vlmprune.models.family import Parts, check_layers
from vlmprune.models.forward import Forward, Prompt, scatter_back
from vlmprune.models.kv_cache import check_cache, entries, is_started, pruned_layer, resident_bytes
from vlmprune.models.kv_layers import PrunedLayer
from vlmprune.models.masks import chunk_mask, decode_step, shifted
from vlmprune.models.probe import read_attention
from vlmprune.models.run import Run
from vlmprune.models.stage import StageRunner
from vlmprune.models.vision import VisionTaps
from vlmprune.policies.base import Needs, PruningPolicy

Kwargs = dict[str, Any]
TAIL = "vlmprune_tail"
"""Keyword that carries the number of candidates from the outer model to the inner one."""


class Engine:
    """Attaches a policy to one model. Run state lives in ``Forward`` objects; the engine keeps the latest run's record."""

    def __init__(self, parts: Parts, policy: PruningPolicy | None) -> None:
        self.parts, self.policy = parts, policy
        self.depth = {layer: i for i, layer in enumerate(parts.layers)}
        self.names = list(inspect.signature(parts.base.forward).parameters)
        self.run = Run(parts, policy)
        self.needs: dict[int, Needs] = {}
        if policy is not None:
            check_layers(policy, parts.config)
            self.needs = {layer: policy.needs(layer) for layer in policy.layers}
        vision = {layer for needs in self.needs.values() for layer in needs.vision}
        self.taps = VisionTaps(parts, sorted(vision), self.run)
        if policy is not None:
            self.stage = StageRunner(parts, policy, self.run, self.taps)
        read = [layer - 1 for layer, needs in self.needs.items() if needs.attention == "previous"]
        self.scored = frozenset(parts.layers[layer].self_attn for layer in read)
        self.wants_embeds = any(needs.embeds for needs in self.needs.values())
        self.wants_text = self.wants_embeds or any(needs.rows == "text" for needs in self.needs.values())
        self.compact = policy is not None and policy.earlier_kv == "compact"
        self.prompt = Prompt()
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
        if self.needs:
            add(parts.model.register_forward_pre_hook(note_candidates, with_kwargs=True))
        add(parts.base.register_forward_pre_hook(self.enter_base, with_kwargs=True))
        for module, before, after in self.run.clock.hooks(parts):
            add(module.register_forward_pre_hook(before))
            add(module.register_forward_hook(after))
        add(parts.text.register_forward_hook(self.after_text, with_kwargs=True))
        self.handles += self.taps.register()
        if not self.needs:
            return
        for attn in self.scored:
            add(attn.register_forward_hook(self.after_attention, with_kwargs=True))
        read = [attn.layer_idx for attn in self.scored]
        start = 0 if self.wants_embeds or self.compact else min([*self.needs, *read])
        for module in parts.layers[start:]:
            add(module.register_forward_pre_hook(self.before_layer, with_kwargs=True))

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
        if isinstance(call.get("cache"), PagedAttentionCache):  # several requests share its rows and pages
            self.missed = "continuous batching cannot be pruned (use generate)"
            raise ModelError(f"cache: {self.missed}")
        if (
            some.shape[1] == 1 and is_started(cache) and not brings_visuals(call)
        ):  # decode: all is in the cache
            return args, {**kwargs, "vlmprune": Forward(self, 1, prompt=self.prompt)}
        tail = kwargs.pop(TAIL, 0)
        return args, {**kwargs, "vlmprune": self._enter_chunk(call, some.shape[:2], tail)}

    # Prompts differ in every shape: nothing here and below it is worth a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter_chunk(self, call: Kwargs, shape: tuple[int, int], tail: int) -> Forward:
        ids, embeds, cache = (call.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
        past = 0 if cache is None else int(cache.get_seq_length())
        forward = Forward(self, shape[1], past, wants_text=self.wants_text, scored=self.scored)
        forward.visuals = visuals = find_visuals(self.parts, call, self.taps.listen() if self.needs else [])
        forward.tail = tail if tail < forward.q - 1 else 0  # more is a call that wants every row's logits
        if forward.q > 1 or visuals is not None:
            fixed = entries(cache, 0, past) + forward.q if getattr(cache, "is_compileable", False) else None
            forward.seen = padding_mask(call.get("attention_mask"), fixed)
        if visuals is not None:
            check_cache(cache if self.needs else None)
            forward.visual = visuals.mask(ids, embeds)
            forward.videos = visuals.mask(ids, embeds, "video") if len(visuals.kinds) > 1 else None
        elif ids is None and past == 0 and self.needs:
            self.missed = (
                self.missed or "inputs_embeds came without input_ids or images: no way to find visual tokens"
            )
        self._note_prompt(forward, shape[0], cache, call.get("use_cache") is not False, tail > 0)
        return forward

    def after_attention(self, module: Any, args: Any, kwargs: Kwargs, output: Any) -> None:
        """Read the query rows and keys that the next layer's stage will score with."""
        forward = self._forward(kwargs)
        if forward is not None and forward.visual is not None:
            self._read(module, kwargs, forward)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _read(self, module: Any, kwargs: Kwargs, forward: Forward) -> None:
        stage = module.layer_idx + 1
        if stage in forward.plans:
            return
        # no_grad: recorded operations would differ when a checkpointed layer is replayed
        with torch.no_grad(), self.run.clock.selection():
            forward.attention[stage] = read_attention(module, kwargs, forward, self.needs[stage])

    def before_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[Any, Kwargs] | None:
        """At a stage drop rows; at and after it hand the layer the tables, mask and cache of the short sequence."""
        i, forward, hidden = self.depth[module], self._forward(kwargs), args[0]
        if forward is None:
            self.missed = (
                self.missed or "decoder layers were called without going through the vision-language model"
            )
            return None
        layer = pruned_layer(kwargs.get("past_key_values"), i)
        if forward.q == 1 and forward.visual is None:
            step = None if layer is None else decode_step(self.parts.text, forward, layer, hidden, kwargs)
            return None if step is None else (args, step)
        return self._before_chunk(i, forward, layer, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_chunk(
        self, i: int, forward: Forward, layer: PrunedLayer | None, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[Any, Kwargs] | None:
        hidden, cache = args[0], kwargs.get("past_key_values")
        rope = kwargs["position_embeddings"]
        if layer is not None and layer.shift is not None:
            rope = shifted(self.parts.text, forward, hidden, kwargs["position_ids"], layer.shift)
        if forward.visual is not None:
            forward.open(kwargs.get("attention_mask"))
            if i == 0 and self.wants_embeds:
                forward.embeds = hidden
            if i in self.needs:
                with self.run.clock.selection():
                    hidden = self.stage(forward, i, hidden, rope, cache)
        plan = forward.plan_at(i)
        if plan is None and layer is None:
            return None
        kwargs = {**kwargs, "position_ids": None}  # FlashAttention reads gaps in them as packed sequences
        kwargs["position_embeddings"] = rope if plan is None else plan.rope
        kwargs["attention_mask"] = chunk_mask(self.parts.text.config, forward, plan, hidden, cache, i)
        return (hidden, *args[1:]), kwargs

    def after_text(self, module: nn.Module, args: Any, kwargs: Kwargs, output: Any) -> Any:
        """Scatter the final hidden states back to the prompt's length, so logits, labels and slicing still fit."""
        forward = self._forward(kwargs)
        if forward is not None and (forward.q > 1 or forward.visual is not None):
            self._after_chunk(forward, output)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_chunk(self, forward: Forward, output: Any) -> None:
        if forward.visual is not None and self.needs:
            self._restore(forward, output)
        self.run.kv_bytes = resident_bytes(output.past_key_values)

    def _restore(self, forward: Forward, output: Any) -> None:
        """Give a pruned call's output its full length; compact its cache if that is asked for."""
        self.taps.heard = None  # the features are the call's own again
        self.run.encoded = len(self.run.crops)
        silent = [layer for layer in self.needs if layer not in forward.plans]
        if silent:
            self.missed = self.missed or f"the stage at layer {silent[0]} did not fire"
        plan = forward.plan_at(len(self.parts.layers))
        if plan is not None:
            if self.compact and output.past_key_values is not None:
                compact_earlier(output.past_key_values, forward, len(self.parts.layers))
            assert plan.layout.origin is not None
            output.last_hidden_state = scatter_back(output.last_hidden_state, plan.layout.origin, forward.q)

    # Pieces

    def _note_prompt(
        self, forward: Forward, batch: int, cache: Cache | None, cached: bool, candidates: bool
    ) -> None:
        """Begin a new record, or go on with that of the prompt this call is a further chunk of.

        A single token without a past (the unconditional pass of classifier-free guidance) is no prompt to describe;
        candidates that follow a prompt are no further chunk of it.
        """
        visuals = forward.visuals
        whole = candidates or (visuals is not None and not visuals.cut)
        if not whole and self.prompt.goes_on(cache, batch, forward.past):
            self.prompt.length += forward.q
            self.run.extend(forward.q, forward.visual)
        elif visuals is not None or (forward.past == 0 and (forward.q > 1 or cache is not None)):
            self.prompt = Prompt(cache, batch, forward.past + forward.q)
            crops = None if visuals is None or visuals.cut else visuals.crops()
            self.run.begin(batch, forward.q, forward.visual, cached, crops)
        forward.prompt = self.prompt

    def _forward(self, kwargs: Kwargs) -> Forward | None:
        """This engine's note about the running call; None if the call did not come through ``enter_base``."""
        forward = kwargs.get("vlmprune")
        return forward if forward is not None and forward.owner is self else None


def note_candidates(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, Kwargs] | None:
    """Tell the inner model how many candidates follow the prompt.

    Assisted decoding appends them to the prefill itself, and asks for the logits of the last prompt row and of each
    of them. So does whoever rates given answers; the row that scores is the last one of the question there too.
    """
    wanted = kwargs.get("logits_to_keep")
    if not isinstance(wanted, int) or wanted < 2:
        return None
    return args, {**kwargs, TAIL: wanted - 1}
