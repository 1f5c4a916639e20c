"""What a pruned run kept, and what it saved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.flops import decoder_flops, layer_inputs, visual_inputs, wave_flops
from vlmprune.models.clock import Seconds
from vlmprune.models.host.parts import Parts, decoder_shape, vision_flops
from vlmprune.models.prompt import Prompts, SecondWave, StageRecord
from vlmprune.policies.base import Insertion, PruningPolicy


@dataclass(frozen=True)
class TokenCounts:
    """Visual tokens, mean per sample: over the decoder layers' inputs, after the last stage, and held in the KV cache (mean
    per layer)."""

    mean_per_layer: float
    after_last_stage: float
    resident_kv: float


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs (2 x MACs) of the batch: decoder prefill unpruned and pruned, vision tower with projector, and writing captions."""

    full: int
    pruned: int
    vision: int
    captions: int = 0

    @property
    def cut(self) -> float:
        """Share of the decoder's prefill FLOPs that pruning saves, what captions cost taken off; at most 1."""
        return 1.0 - (self.pruned + self.captions) / self.full if self.full else 0.0


@dataclass(frozen=True)
class Report:
    """Numbers of the latest prefill and the decoding after it.

    ``visual_tokens`` is the mean per sample before pruning. ``paths`` says of each stage whether it ran as one fused pass, and
    on which kernels, or why not. ``kv_bytes`` is what the KV cache held after the latest prompt
    chunk, of the whole batch and with the text; of a static cache all it allocates. ``graph`` says whether the prefill was
    replayed from a CUDA graph, or why it was not; "" = the scope has no ``graphs``. ``captions`` are the texts that joined
    each sample's prompt, one for every image that lost tokens, and ``caption_seconds`` is how long they took to write, part
    of the selection. ``second_wave`` has the rows that ran the first layers behind the others (``Needs(wave=True)``), counted in
    ``flops``. Decode steps that were compiled as a whole are neither timed nor counted: no hook runs in them.
    """

    visual_tokens: float
    stages: tuple[tuple[int, int, int], ...]
    tokens: TokenCounts
    flops: FlopCounts
    seconds: Seconds
    decode_steps: int
    kv_bytes: int = 0
    paths: tuple[str, ...] = ()
    graph: str = ""
    captions: tuple[tuple[str, ...], ...] = ()
    caption_seconds: float = 0.0
    second_wave: SecondWave | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        out = dataclasses.asdict(self)
        out["stages"] = [
            dict(zip(("layer", "tokens_in", "tokens_kept"), s, strict=True)) for s in self.stages
        ]
        out["flops"]["cut"] = self.flops.cut
        out["second_wave"] = None if self.second_wave is None else self.second_wave._asdict()
        return out


class Run:
    """The handle a pruning scope gives out. Describes the latest prefill: each new one starts it afresh.

    A text-only prompt is a prefill too. Chunked prefill is one prefill: its stages are those of the chunks put together,
    and its FLOPs those of the same rows in one call. With several threads it is the prefill that began last.
    """

    def __init__(self, parts: Parts, policy: PruningPolicy | None, prompts: Prompts) -> None:
        self.policy, self._parts, self._prompts = policy, parts, prompts

    @property
    def stages(self) -> list[StageRecord]:
        """The stages that have chosen, in the order of their layers."""
        return list(self._prompts.latest.stages.values())

    def kept(self, sample: int = 0) -> Tensor:
        """Ordinals (prompt order, 0-based) of one sample's visual tokens that survive the last stage, 1-D int64."""
        return self.kept_at(len(self.stages) - 1, sample)

    def kept_at(self, stage: int, sample: int = 0) -> Tensor:
        """The same after ``stages[stage]``; -1 = before any, all of them."""
        prompt = self._prompts.latest
        check(0 <= sample < max(prompt.batch, 1), "sample", f"0..{max(prompt.batch, 1) - 1}", sample)
        check(-1 <= stage < len(self.stages), "stage", f"-1..{len(self.stages) - 1}", stage)
        if stage >= 0:
            kept = self.stages[stage].ordinals[sample]
            return kept[kept >= 0]
        return torch.arange(prompt.visual_counts()[sample] if prompt.batch else 0)

    @property
    def inserted(self) -> Insertion | None:
        """The texts that joined the prompts, with what they were chosen from and what they cost; None = none did."""
        return self._prompts.latest.inserted

    def report(self) -> Report:
        """Tokens, FLOPs and seconds of the latest prefill and what followed. Waits for the device."""
        prompt, depth = self._prompts.latest, len(self._parts.layers)
        captions = prompt.inserted.captions if prompt.inserted is not None else ()
        full = max(sum(prompt.visual_counts()) / max(prompt.batch, 1), 0.0)
        after = [(stage.layer, sum(stage.kept) / len(stage.kept)) for stage in self.stages]
        second = prompt.second_wave
        wave = None if second is None else (second.layer, second.width)
        visual = visual_inputs(depth, full, after, wave)
        rows = layer_inputs(depth, prompt.length, list(prompt.rows.items()))
        shape, seconds = decoder_shape(self._parts.config), prompt.marks.seconds()
        mean = sum(visual) / depth
        compact = self.policy is not None and self.policy.earlier_kv == "compact"
        resident = visual[-1] if compact else mean
        return Report(
            visual_tokens=full,
            stages=tuple((s.layer, s.tokens_in, s.tokens_kept) for s in self.stages),
            tokens=TokenCounts(mean, visual[-1], 0.0 if prompt.kv_bytes is None else resident),
            flops=FlopCounts(
                full=prompt.batch * decoder_flops(shape, [prompt.length] * depth),
                pruned=prompt.batch * (decoder_flops(shape, rows) + wave_flops(shape, rows, wave)),
                vision=vision_flops(self._parts, prompt.crops) if full else 0,
                captions=sum(caption.flops for sample in captions for caption in sample),
            ),
            seconds=seconds if full else dataclasses.replace(seconds, vision=0.0),
            decode_steps=prompt.marks.steps,
            kv_bytes=prompt.kv_bytes or 0,
            paths=tuple(stage.path for stage in self.stages),
            graph=prompt.graph,
            captions=tuple(tuple(caption.text for caption in sample) for sample in captions),
            caption_seconds=prompt.inserted.seconds if prompt.inserted is not None else 0.0,
            second_wave=second,
        )
