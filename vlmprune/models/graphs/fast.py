"""The text model's forward in a scope with graphs: a prefill like one before it is replayed, everything else runs as ever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from vlmprune.constants import counting
from vlmprune.errors import first_line
from vlmprune.models.clock import Clock
from vlmprune.models.graphs.buckets import bucket, rounded
from vlmprune.models.graphs.capture import Bucket, Subject, capture, parts_of
from vlmprune.models.graphs.hand_over import hand_over
from vlmprune.models.graphs.prompt_rows import PromptRows
from vlmprune.models.graphs.reads import HostRead
from vlmprune.models.graphs.store import Graph, Graphs, Inputs
from vlmprune.models.graphs.unfit import ends_with_image, hooked, unfit_call, unfit_model
from vlmprune.models.host.names import CACHE, Signature
from vlmprune.models.host.parts import Parts
from vlmprune.models.prefill import RUNNING, Prefill, Wants
from vlmprune.models.stage import StageRunner
from vlmprune.models.unpruned import Unpruned
from vlmprune.models.vision_reads import VisionReads
from vlmprune.policies.base import PruningPolicy

Given = Mapping[str, Any]
REPLAYED, PLAIN = "replayed", "plain: "
"""How ``run.report().graph`` begins."""


class FastPath:
    """Stands in the place of one text model's forward.

    Args:
        parts, policy, wants, vision, clock: the engine's.
        graphs: what is captured, and where it is kept.
    """

    def __init__(
        self,
        parts: Parts,
        policy: PruningPolicy | None,
        wants: Wants,
        vision: VisionReads,
        clock: Clock,
        graphs: Graphs,
    ) -> None:
        text = parts.text
        self.told = Signature(text, ("inputs_embeds", "attention_mask", "position_ids", "use_cache"))
        self.parts, self.policy, self.vision = parts, policy, vision
        self.named = policy, repr(policy)  # keep=1 and keep=1.0 are equal, though one token is not all
        self.clock, self.graphs = clock, graphs
        projector = (parts.projector,) if vision.attn else ()
        self.subject = Subject(text, type(text).forward, self.told.first(CACHE), wants, projector)
        self.empties = policy is not None and any(map(policy.empties, policy.layers))
        self.refused = graphs.recorder.refusal(text.device) or unfit_model(text, policy)

    @property
    def said(self) -> str:
        """What the report says where no prefill could be a graph."""
        return f"{PLAIN}{self.refused}"

    def attach(self) -> None:
        """Take the place, unless no prefill could be a graph."""
        if self.refused is None:
            self.subject.text.forward = self.forward

    def detach(self) -> None:
        """Leave it, if it was taken."""
        if self.refused is None:
            vars(self.subject.text).pop("forward", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The text model's, for any call of it."""
        prefill: Prefill | None = kwargs.get(RUNNING)  # our own keyword
        if prefill is not None and not prefill.call.decodes:
            output = self._prefill(prefill, self.told.read(args, kwargs))
            if output is not None:
                return output
        return self.subject.forward(self.subject.text, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prefill(self, prefill: Prefill, given: Given) -> Any:
        """A replay's output; None where the call is to run as ever."""
        unfit, output = unfit_call(prefill, given, self.subject.text), None
        if unfit is None:
            with self.graphs.lock:
                why, output = self._replayed(prefill, given)
        if prefill.prompt is not None:
            prefill.prompt.graph = why if unfit is None else f"{PLAIN}{unfit}"
        return output

    def _replayed(self, prefill: Prefill, given: Given) -> tuple[str, Any]:
        """What the report says, and a replay's output or None."""
        prefill.open(prefill.call.mask, given["inputs_embeds"])
        assert prefill.unpruned is not None
        layout = prefill.unpruned.layout
        if layout.valid is None:
            prefill.call = replace(prefill.call, mask=None)
        elif layout.trailing and prefill.call.logits:
            return f"{PLAIN}padding on the right", None  # which is an error there
        if layout.hidden:
            return f"{PLAIN}the attention mask hides visual tokens", None
        if self.empties and ends_with_image(prefill.unpruned):
            return f"{PLAIN}a prompt that ends with its image, whose last row stays", None
        fixed = self._bucket(prefill, prefill.unpruned)
        rows = PromptRows(layout, fixed.length)
        prompt = self._inputs(prefill, given, rows, fixed)
        key = self._key(prefill, prompt, fixed)
        graph = self.graphs.find(key)
        if graph is None:
            why = self.graphs.why_not(key)
            if why is None:
                graph, why = self._captured(prefill, rows, prompt, fixed, key)
            if graph is None:
                return f"{PLAIN}{why}", None
        rows.fill(graph.inputs, prompt)
        graph.recording.replay()
        cache = self._cache(prefill, given)
        told = {"last_hidden_state": hand_over(graph, prefill, rows, cache), self.subject.cache: cache}
        batch = len(prompt.rows)
        return f"{REPLAYED}: {batch} x {fixed.length} rows", type(graph.output)(**told)

    def _captured(
        self, prefill: Prefill, rows: PromptRows, prompt: Inputs, fixed: Bucket, key: Any
    ) -> tuple[Graph | None, str]:
        """A new graph, or why there is none, which is remembered if it stays so."""
        graphs, runner = self.graphs, None
        why: str | None = hooked(self.subject.text)
        if why is not None:
            return None, why  # until they are gone
        if self.policy is not None:
            runner = StageRunner(self.parts, self.policy, self.vision)
        try:
            with self.clock.aside():
                graph = capture(self.subject, runner, fixed, prefill, rows, prompt, graphs.recorder)
        except HostRead as read:
            why = f"adaptive: a choice depends on what the host has read ({read})"
        except torch.OutOfMemoryError:
            why = "memory short"
        except torch.AcceleratorError as error:
            why = f"the capture failed: {first_line(error)}"
        else:
            steady = graph.bindings.hold()
            why = graphs.keep(key, graph) if steady else "other code's modules change as they run"
            if why is None:
                return graph, ""
        assert why is not None
        graphs.refuse(key, why)
        return None, why

    def _cache(self, prefill: Prefill, given: Given) -> Any:
        """The cache to fill: the call's, or one that is made as the text model would."""
        config, asked = self.subject.text.config, given["use_cache"]
        if prefill.call.cache is not None or not (config.use_cache if asked is None else asked):
            return prefill.call.cache
        return DynamicCache(config=config)

    def _bucket(self, prefill: Prefill, unpruned: Unpruned) -> Bucket:
        """That of a prompt. Raises ModelError where stages read the vision tower, and its run was not seen."""
        layout, text, note = unpruned.layout, unpruned.text, None
        if self.vision.attn and prefill.call.visuals is not None:
            note = self.vision.note(prefill.call.visuals, unpruned.seen)
        words = 0 if text is None else rounded(max(1, *text.words))
        return Bucket(bucket(layout.real, layout.counts), words, note)

    def _inputs(self, prefill: Prefill, given: Given, rows: PromptRows, fixed: Bucket) -> Inputs:
        """What the prompt brings, in its own rows."""
        embeds, visual, positions = given["inputs_embeds"], prefill.call.visual, given["position_ids"]
        assert visual is not None and prefill.unpruned is not None
        if (
            positions is None
        ):  # as the model counts; of its own count the rows behind the prompt would be a part
            positions = counting(visual.shape[0], visual.shape[1], visual.device)
        axes = (positions,) if positions.ndim == 2 else positions.unbind(0)
        text = None if prefill.unpruned.text is None else prefill.unpruned.text.mask
        seen = () if fixed.note is None else parts_of(fixed.note)
        planes = prefill.planes
        if self.parts.family.deepstack and not planes:  # left to the text model, which would read the device
            planes = self.parts.host.deepstack((), given)
        added = tuple(x.to(embeds) for x in planes)
        return Inputs(rows.rows, embeds, visual, axes, text, added, seen)

    def _key(self, prefill: Prefill, prompt: Inputs, fixed: Bucket) -> Any:
        """All that two prompts of one graph have in common."""
        text, embeds, unpruned = self.subject.text, prompt.embeds, prefill.unpruned
        assert unpruned is not None
        stream = torch.cuda.current_stream(embeds.device).cuda_stream if embeds.is_cuda else 0
        note = None if fixed.note is None else (fixed.note.crops, str(fixed.note.thw))
        shapes = (
            [(x.shape[2:], x.dtype) for x in prompt.by_row()],
            [(x.shape, x.dtype) for x in prompt.whole()],
        )
        return (
            text,
            self.named,
            text.config._attn_implementation,
            stream,
            fixed[:2],
            note,
            len(prompt.positions),
            unpruned.layout.counts,
            unpruned.seen,
            *map(tuple, shapes),
        )
