"""The hooks that prune one model instance while it runs; docs/prefill.md draws the way of one prefill through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache

from vlmprune.errors import ModelError, NotPrunedError
from vlmprune.models.call import Asked, Call, read_asked, read_call
from vlmprune.models.clock import Clock
from vlmprune.models.compaction import compact_earlier
from vlmprune.models.decoder_reads import read_attention
from vlmprune.models.graphs.fast import FastPath
from vlmprune.models.graphs.store import Graphs
from vlmprune.models.host.cache_layers import PrunedLayer
from vlmprune.models.host.cache_view import is_started, pruned_layer, resident_bytes
from vlmprune.models.host.masks import check_adds, check_shows
from vlmprune.models.host.names import DEEPSTACK, missing
from vlmprune.models.host.parts import Parts, check_features, check_stages
from vlmprune.models.layer_inputs import chunk_mask, decode_step, first_wave_mask, places_of, shifted
from vlmprune.models.layout import spread
from vlmprune.models.prefill import RUNNING, Prefill, Wants
from vlmprune.models.prompt import Prompts
from vlmprune.models.report import Run
from vlmprune.models.second_wave import run_second_wave
from vlmprune.models.stage import StageRunner
from vlmprune.models.vision_reads import VisionReads
from vlmprune.policies.base import PruningPolicy

Kwargs = dict[str, Any]
Args = tuple[Any, ...]
ASKED = "vlmprune_asked"
"""Keyword that carries what the outer model was asked for to the inner one."""


class Engine:
    """Attaches a policy to one model. What is under way lives in ``Prefill`` and ``Prompt``, one for each call and prompt."""

    def __init__(self, parts: Parts, policy: PruningPolicy | None, graphs: Graphs | None = None) -> None:
        self.parts, self.policy, self.host = parts, policy, parts.host
        self.depth = {layer: i for i, layer in enumerate(parts.layers)}
        self.clock, self.prompts = Clock(next(parts.text.parameters()).device), Prompts()
        self.run = Run(parts, policy, self.prompts)
        if policy is not None:
            check_stages(policy, parts.config)
            if policy.rectify:
                check_adds(parts.text.config)
            if any(policy.needs(layer).wave for layer in policy.layers):
                check_shows(parts.text.config)
        needs = {} if policy is None else {layer: policy.needs(layer) for layer in policy.layers}
        self.wants = Wants.of(needs, parts.layers, parts.text.config)
        read = sorted({layer for need in needs.values() for layer in need.vision})
        self.vision = VisionReads(parts, read, any(need.values for need in needs.values()))
        self.stage = None if policy is None else StageRunner(parts, policy, self.vision)
        self.fast = (
            None if graphs is None else FastPath(parts, policy, self.wants, self.vision, self.clock, graphs)
        )
        self.lost = 0
        self.handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks; on an error none stays behind."""
        parts, add, prunes = self.parts, self.handles.append, self.stage is not None
        follows = prunes or self.fast is not None
        try:
            if prunes:
                add(parts.model.register_forward_pre_hook(self.before_model, with_kwargs=True))
            add(parts.base.register_forward_pre_hook(self.before_base, with_kwargs=True))
            self.handles += self.clock.register(parts)
            if prunes and parts.family.deepstack:
                add(parts.text.register_forward_pre_hook(self.before_text, with_kwargs=True))
            add(parts.text.register_forward_hook(self.after_text, with_kwargs=True))
            for handle in self.vision.register():
                add(handle)
            for attn in self.wants.scored:
                add(attn.register_forward_hook(self.after_attention, with_kwargs=True))
            for module in parts.layers if follows else ():
                add(module.register_forward_pre_hook(self.before_layer, with_kwargs=True))
            if self.fast is not None:
                self.fast.attach()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook off again."""
        tables = [(handle.id, handle.hooks_dict_ref()) for handle in self.handles]
        self.lost += sum(table is not None and key not in table for key, table in tables)
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.fast is not None:
            self.fast.detach()

    def raise_if_lost(self) -> None:
        """Raise NotPrunedError if other code took hooks off: from then on nothing was pruned."""
        if self.lost:
            raise NotPrunedError(
                f"the model was not pruned to the end: {self.lost} of its hooks were removed by other code"
            )

    # Hooks. Prompts differ in every shape: what is no decode step is not worth a graph.

    def before_model(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Any, Kwargs] | None:
        """Tell the inner model which rows' logits are wanted."""
        asked = read_asked(self.host.model.read(args, kwargs), module.training and torch.is_grad_enabled())
        return None if asked == Asked() else (args, {**kwargs, ASKED: asked})

    def before_base(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Any, Kwargs]:
        """Read what the call brings, and send it along to the layers."""
        asked = Asked()
        if ASKED in kwargs:
            asked = kwargs[ASKED]
            kwargs = {name: value for name, value in kwargs.items() if name != ASKED}
        given = self.host.arguments(args, kwargs)
        if given.shape is None:
            return args, kwargs  # the model itself explains what is missing
        if isinstance(given.cache, PagedAttentionCache):  # several requests share its rows and pages
            raise ModelError("cache: continuous batching cannot be pruned (use generate)")
        if (
            given.shape[1] == 1 and is_started(given.cache) and not given.visual
        ):  # decode: all is in the cache
            step = Call(given.shape[0], 1, cache=given.cache)
            return args, {**kwargs, RUNNING: Prefill(self.wants, step)}
        call = read_call(self.parts, given, asked, self.vision, self.stage is not None)
        prompt = self.prompts.enter(call, self.clock)
        if prompt is not None and self.fast is not None and self.fast.refused is not None:
            prompt.graph = self.fast.said
        return args, {**kwargs, RUNNING: Prefill(self.wants, call, prompt)}

    def before_text(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Take over what the text model would add to all rows of the prompt, if a stage comes before."""
        prefill = self._running(kwargs)
        if prefill is None or prefill.call.visual is None:
            return None
        given = self.host.deepstack(args, kwargs)
        if min(self.wants.needs) >= len(given):
            return None
        check_features(self.parts, given)
        prefill.planes = given
        return args, {**kwargs, **dict.fromkeys(DEEPSTACK)}

    def after_attention(self, module: Any, args: Any, kwargs: Kwargs, output: Any) -> None:
        """Read the query rows and keys that the next layer's stage will score with."""
        prefill = self._running(kwargs)
        if prefill is not None and prefill.scores_from(module):
            told = self.host.told
            read_attention(
                module,
                told(kwargs, "hidden_states"),
                told(kwargs, "position_embeddings"),
                prefill,
                self.clock,
            )

    def before_layer(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Any, Kwargs] | None:
        """At a stage drop rows; at and after it hand the layer the tables, mask and cache of the short sequence."""
        i, prefill = self.depth[module], self._running(kwargs)
        if prefill is None:
            raise NotPrunedError("decoder layers were called without going through the vision-language model")
        if not args:
            missing("the positional arguments of a decoder layer", "hidden_states")
        if prefill.second:
            return None
        prefill.cache = self.host.told(kwargs, self.host.cache)
        lost = prefill.cache is None and prefill.call.cache is not None  # it would be read as "no past"
        if lost and not (module.training and module.gradient_checkpointing):  # that takes it away on purpose
            raise ModelError("cache: expected the call's KV cache at its decoder layers, got None there")
        layer = pruned_layer(prefill.cache, i)
        if prefill.call.decodes:
            step = None if layer is None else decode_step(self.parts, prefill, layer, args[0], kwargs)
            return None if step is None else (args, step)
        return self._before_chunk(i, prefill, layer, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_chunk(
        self, i: int, prefill: Prefill, layer: PrunedLayer | None, args: Args, kwargs: Kwargs
    ) -> tuple[Any, Kwargs] | None:
        hidden, text, told = args[0], self.parts.text, self.host.told
        rope = told(kwargs, "position_embeddings")
        if layer is not None and layer.shift is not None:
            rope = shifted(text, prefill, hidden, told(kwargs, "position_ids"), layer.shift)
        stage = None if prefill.call.visual is None else self.stage
        if stage is not None:
            prefill.open(told(kwargs, "attention_mask"), hidden)
        hidden = prefill.deepened(i, hidden)
        if stage is not None and i in self.wants.needs:
            if self.wants.needs[i].tokens and self.parts.family.packs:
                shift = None if layer is None else layer.shift
                prefill.places = places_of(told(kwargs, "position_ids"), shift)
            with self.clock.selection(i):
                entered = self.clock.mine.marks
                hidden = (prefill.runner or stage)(prefill, i, hidden, rope)
                if self.clock.mine.marks is not entered and prefill.prompt is not None:
                    # a compensator ran this very model: its prompts are over, this one goes on
                    self.clock.mine.marks, self.prompts.latest = entered, prefill.prompt
        if i == self.wants.wave_layer and prefill.waves is not None:
            with self.clock.second_wave():
                hidden = run_second_wave(self.parts, prefill, hidden, kwargs)
        if stage is not None:
            prefill.keep_earlier(i, hidden)
        decided = prefill.decision(i)
        if decided is None and layer is None and not prefill.bound:
            return None if hidden is args[0] else ((hidden, *args[1:]), kwargs)
        kwargs = {**kwargs, "position_ids": None}  # FlashAttention reads gaps in them as packed sequences
        kwargs["position_embeddings"] = rope if decided is None else decided.rope
        if prefill.waves is None or decided is None:
            kwargs["attention_mask"] = chunk_mask(text.config, prefill, decided, hidden, i)
        else:
            kwargs["attention_mask"] = first_wave_mask(text.config, prefill, decided, hidden, i)
            kwargs[self.host.cache] = prefill.waves
        return (hidden, *args[1:]), kwargs

    def after_text(self, module: nn.Module, args: Any, kwargs: Kwargs, output: Any) -> Any:
        """Scatter the final hidden states back to the prompt's length, so logits, labels and slicing still fit."""
        prefill = self._running(kwargs)
        if prefill is not None and not prefill.call.decodes:
            self._end(prefill, output)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, prefill: Prefill, output: Any) -> None:
        cache, prompt, visuals = self.host.output_cache(output), prefill.prompt, prefill.call.visuals
        if visuals is not None:
            crops = self.vision.done(visuals)
            if prompt is not None and crops:
                prompt.crops = crops
            if self.stage is not None:
                self._restore(prefill, output, cache)
        if prompt is not None:
            prompt.kv_bytes = None if cache is None else resident_bytes(cache)

    def _restore(self, prefill: Prefill, output: Any, cache: Cache | None) -> None:
        """Give a pruned call's output its full length; compact its cache if that is asked for."""
        silent = [layer for layer in self.wants.needs if layer not in prefill.decisions]
        if silent:
            raise NotPrunedError(
                f"the model ran but was not pruned as asked: the stage at layer {silent[0]} did not fire"
            )
        depth = len(self.parts.layers)
        decided = prefill.decision(depth)
        if decided is not None and decided.layout.origin is not None:
            if self.policy is not None and self.policy.earlier_kv == "compact" and cache is not None:
                with self.clock.selection(max(self.wants.needs)):
                    compact_earlier(cache, prefill, depth)
            layout, short = decided.layout, output.last_hidden_state
            assert layout.origin is not None
            origin, padded = layout.origin.to(short.device), layout.valid is not None
            output.last_hidden_state = spread(origin, short, prefill.call.length, padded=padded)

    def _running(self, kwargs: Kwargs) -> Prefill | None:
        """The running call; None if it did not come through this engine's ``before_base``."""
        prefill: Prefill | None = kwargs.get(RUNNING)  # our own keyword
        return prefill if prefill is not None and prefill.wants is self.wants else None
