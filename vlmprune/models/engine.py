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
from transformers.generation.continuous_batching import PagedAttentionCache

from vlmprune.errors import ModelError, NotPrunedError, check
from vlmprune.models.calls import Asked, check_unpacked, find_visuals, padding_mask, read_asked
from vlmprune.models.clock import Clock
from vlmprune.models.compaction import compact_earlier
from vlmprune.models.family import Parts, check_layers
from vlmprune.models.forward import Forward, scatter_back
from vlmprune.models.host import Call, check_same_cache, missing
from vlmprune.models.kv_cache import check_cache, entries, is_started, pruned_layer, resident_bytes
from vlmprune.models.kv_layers import PrunedLayer
from vlmprune.models.masks import chunk_mask, decode_step, shifted
from vlmprune.models.probe import read_attention
from vlmprune.models.prompt import Prompt, Prompts
from vlmprune.models.run import Run
from vlmprune.models.stage import StageRunner
from vlmprune.models.vision import VisionTaps
from vlmprune.policies.base import Needs, PruningPolicy

Kwargs = dict[str, Any]
NOTE, ASKED = "vlmprune", "vlmprune_asked"
"""Keywords that carry the running call to the layers, and what the outer model was asked for to the inner one."""


class Engine:
    """Attaches a policy to one model. Run state lives in ``Forward`` and ``Prompt`` objects, one for each call and prompt."""

    def __init__(self, parts: Parts, policy: PruningPolicy | None) -> None:
        self.parts, self.policy, self.host = parts, policy, parts.host
        self.depth = {layer: i for i, layer in enumerate(parts.layers)}
        self.run = Run(parts, policy)
        self.clock = Clock(next(parts.text.parameters()).device)
        self.needs: dict[int, Needs] = {}
        if policy is not None:
            check_layers(policy, parts.config)
            self.needs = {layer: policy.needs(layer) for layer in policy.layers}
        self.taps = VisionTaps(
            parts, sorted({layer for needs in self.needs.values() for layer in needs.vision})
        )
        if policy is not None:
            self.stage = StageRunner(parts, policy, self.taps)
        read = [layer - 1 for layer, needs in self.needs.items() if needs.attention == "previous"]
        self.scored = frozenset(parts.layers[layer].self_attn for layer in read)
        self.wants_embeds = any(needs.embeds for needs in self.needs.values())
        self.wants_text = self.wants_embeds or any(needs.rows == "text" for needs in self.needs.values())
        self.compact = policy is not None and policy.earlier_kv == "compact"
        self.prompts = Prompts()
        self.lost = 0
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
            add(parts.model.register_forward_pre_hook(self.note_asked, with_kwargs=True))
        add(parts.base.register_forward_pre_hook(self.enter_base, with_kwargs=True))
        for module, before, after in self.clock.hooks(parts):
            add(module.register_forward_pre_hook(before))
            add(module.register_forward_hook(after))
        add(parts.text.register_forward_hook(self.after_text, with_kwargs=True))
        self.handles += self.taps.register()
        if not self.needs:
            return
        for attn in self.scored:
            add(attn.register_forward_hook(self.after_attention, with_kwargs=True))
        for module in parts.layers:
            add(module.register_forward_pre_hook(self.before_layer, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook off again."""
        tables = [(handle.id, handle.hooks_dict_ref()) for handle in self.handles]
        self.lost += sum(table is not None and key not in table for key, table in tables)
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def raise_if_lost(self) -> None:
        """Raise NotPrunedError if other code took hooks off: from then on nothing was pruned."""
        if self.lost:
            raise NotPrunedError(
                f"the model was not pruned to the end: {self.lost} of its hooks were removed by other code"
            )

    # Hooks

    def note_asked(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[Any, Kwargs] | None:
        """Tell the inner model which rows' logits are wanted.

        Assisted decoding appends candidates to the prefill itself, and asks for the logits of the last prompt row and of
        each of them. So does whoever rates given answers; the row that scores is the last one of the question there too.
        """
        asked = read_asked(self.host.model.read(args, kwargs), module.training and torch.is_grad_enabled())
        return None if asked == Asked() else (args, {**kwargs, ASKED: asked})

    def enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, Kwargs]:
        """Note which positions of this call are visual tokens, and send the note along to the layers."""
        asked = Asked()
        if ASKED in kwargs:
            asked = kwargs[ASKED]
            kwargs = {name: value for name, value in kwargs.items() if name != ASKED}
        call = self.host.call(args, kwargs)
        if call.shape is None:
            return args, kwargs  # the model itself explains what is missing
        if isinstance(call.cache, PagedAttentionCache):  # several requests share its rows and pages
            raise ModelError("cache: continuous batching cannot be pruned (use generate)")
        if call.shape[1] == 1 and is_started(call.cache) and not call.visual:  # decode: all is in the cache
            return args, {**kwargs, NOTE: Forward(self, 1, given=call.cache)}
        return args, {**kwargs, NOTE: self._enter_chunk(call, call.shape, asked)}

    # Prompts differ in every shape: nothing here and below it is worth a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter_chunk(self, call: Call, shape: tuple[int, int], asked: Asked) -> Forward:
        cache = call.cache
        past = 0 if cache is None else int(cache.get_seq_length())
        forward = Forward(self, shape[1], past, cache, wants_text=self.wants_text, scored=self.scored)
        forward.visuals = visuals = find_visuals(self.parts, call, self.taps.listen(), self.taps.notes)
        tail = max(asked.logits - 1, 0)
        forward.tail = tail if tail < forward.q - 1 else 0  # more is a call that wants every row's logits
        forward.goes_on = asked.logits > 0
        if forward.q > 1 or visuals is not None:
            fixed = (
                entries(cache, 0, past) + forward.q if cache is not None and cache.is_compileable else None
            )
            forward.seen = padding_mask(call.mask, fixed)
        if visuals is not None:
            self._find(forward, call, asked)
        elif call.ids is None and past == 0 and self.needs:
            raise NotPrunedError(
                "inputs_embeds: expected input_ids or images with it, got neither: no way to find visual tokens"
            )
        self._note_prompt(forward, shape[0], tail > 0)
        return forward

    def _find(self, forward: Forward, call: Call, asked: Asked) -> None:
        """Note where the visual tokens of this call are, and from which of them a label is predicted."""
        assert forward.visuals is not None
        if self.needs:
            check_cache(call.cache)
            check_unpacked(call, "flash" in self.parts.text.config._attn_implementation)
        kinds, predicting = forward.visuals.kinds, asked.predicting
        forward.visual = forward.visuals.mask(call.ids, call.embeds)
        forward.videos = forward.visuals.mask(call.ids, call.embeds, "video") if len(kinds) > 1 else None
        if isinstance(predicting, Tensor):
            check(
                predicting.shape == call.shape,
                "labels",
                f"{call.shape} as the tokens",
                tuple(predicting.shape),
            )
            forward.predicting = predicting.to(forward.visual.device)
        elif predicting:
            forward.predicting = nn.functional.pad(~forward.visual[:, 1:], (0, 1), value=False)

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
        with torch.no_grad(), self.clock.selection():
            forward.attention[stage] = read_attention(module, kwargs, forward, self.needs[stage])

    def before_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[Any, Kwargs] | None:
        """At a stage drop rows; at and after it hand the layer the tables, mask and cache of the short sequence."""
        i, forward = self.depth[module], self._forward(kwargs)
        if forward is None:
            raise NotPrunedError("decoder layers were called without going through the vision-language model")
        if not args:
            missing("the positional arguments of a decoder layer", "hidden_states")
        hidden, forward.cache = args[0], self.host.layer_cache(kwargs)
        if forward.cache is None and forward.given is not None:
            check_same_cache(
                forward.given, forward.cache, module.training and bool(module.gradient_checkpointing)
            )
        layer = pruned_layer(forward.cache, i)
        if forward.q == 1 and forward.visual is None:
            step = None if layer is None else decode_step(self.parts.text, forward, layer, hidden, kwargs)
            return None if step is None else (args, step)
        return self._before_chunk(i, forward, layer, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_chunk(
        self, i: int, forward: Forward, layer: PrunedLayer | None, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[Any, Kwargs] | None:
        hidden, told = args[0], self.host.told
        rope = told(kwargs, "position_embeddings")
        if layer is not None and layer.shift is not None:
            rope = shifted(self.parts.text, forward, hidden, told(kwargs, "position_ids"), layer.shift)
        if forward.visual is not None:
            forward.open(told(kwargs, "attention_mask"))
            if i == 0 and self.wants_embeds:
                forward.embeds = hidden
            if i in self.needs:
                with self.clock.selection():
                    hidden = self.stage(forward, i, hidden, rope)
        plan = forward.plan_at(i)
        if plan is None and layer is None:
            return None
        kwargs = {**kwargs, "position_ids": None}  # FlashAttention reads gaps in them as packed sequences
        kwargs["position_embeddings"] = rope if plan is None else plan.rope
        kwargs["attention_mask"] = chunk_mask(self.parts.text.config, forward, plan, hidden, i)
        return (hidden, *args[1:]), kwargs

    def after_text(self, module: nn.Module, args: Any, kwargs: Kwargs, output: Any) -> Any:
        """Scatter the final hidden states back to the prompt's length, so logits, labels and slicing still fit."""
        forward = self._forward(kwargs)
        if forward is not None and (forward.q > 1 or forward.visual is not None):
            self._after_chunk(forward, output)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_chunk(self, forward: Forward, output: Any) -> None:
        cache = self.host.output_cache(output)
        if forward.visuals is not None:
            crops = self.taps.done(forward.visuals)
            if forward.prompt is not None and crops:
                forward.prompt.crops = crops
            if self.needs:
                self._restore(forward, output, cache)
        if forward.prompt is not None:
            forward.prompt.kv_bytes = None if cache is None else resident_bytes(cache)

    def _restore(self, forward: Forward, output: Any, cache: Cache | None) -> None:
        """Give a pruned call's output its full length; compact its cache if that is asked for."""
        silent = [layer for layer in self.needs if layer not in forward.plans]
        if silent:
            raise NotPrunedError(
                f"the model ran but was not pruned as asked: the stage at layer {silent[0]} did not fire"
            )
        plan = forward.plan_at(len(self.parts.layers))
        if plan is not None:
            if self.compact and cache is not None:
                compact_earlier(cache, forward, len(self.parts.layers))
            assert plan.layout.origin is not None
            output.last_hidden_state = scatter_back(output.last_hidden_state, plan.layout.origin, forward.q)

    # Pieces

    def _note_prompt(self, forward: Forward, batch: int, candidates: bool) -> None:
        """Begin a new record, or go on with that of the prompt this call is a further chunk of.

        A single token without a past (the unconditional pass of classifier-free guidance) is no prompt to describe;
        candidates that follow a prompt are no further chunk of it.
        """
        visuals, cache = forward.visuals, forward.given
        whole = candidates or (visuals is not None and not visuals.cut)
        known = None if cache is None else self.prompts.get(cache)
        if not whole and known is not None and known.goes_on(batch, forward.past):
            forward.prompt = known
            self.clock.resume(known.marks)
        elif visuals is not None or (forward.past == 0 and (forward.q > 1 or cache is not None)):
            forward.prompt = Prompt(batch, forward.past, marks=self.clock.begin())
            if cache is not None:
                self.prompts[cache] = forward.prompt
            self.run.prompt = forward.prompt
        else:
            forward.prompt = known
            return
        forward.prompt.extend(forward.q, forward.visual)

    def _forward(self, kwargs: Kwargs) -> Forward | None:
        """This engine's note about the running call; None if the call did not come through ``enter_base``."""
        forward: Forward | None = kwargs.get(NOTE)  # our own keyword
        return forward if forward is not None and forward.owner is self else None
