"""What a pruned run kept, and what it saved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.flops import decoder_flops, layer_inputs
from vlmprune.models.clock import Clock, Seconds
from vlmprune.models.family import Parts, decoder_shape, vision_flops
from vlmprune.models.layout import Layout, ascending, take
from vlmprune.policies.base import PruningPolicy


@dataclass(frozen=True)
class StageRecord:
    """One stage of the latest prefill.

    Attributes:
        layer: the first decoder layer that saw the shortened sequence.
        tokens_in, tokens_kept: visual tokens entering and surviving, of the sample with the most.
        index: ``[B, tokens_kept]`` int64 positions in the prompt of the survivors, ascending, -1 = padding.
        ordinals: ``[B, tokens_kept]`` int64, the same as numbers among the prompt's visual tokens.
    """

    layer: int
    tokens_in: int
    tokens_kept: int
    index: Tensor
    ordinals: Tensor


@dataclass(frozen=True)
class TokenCounts:
    """Visual tokens, mean per sample: over the decoder layers' inputs, after the last stage, and held in the KV cache (mean
    per layer)."""

    mean_per_layer: float
    after_last_stage: float
    resident_kv: float


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs (2 x MACs) of the batch: decoder prefill unpruned and pruned, and the vision tower with projector."""

    full: int
    pruned: int
    vision: int

    @property
    def cut(self) -> float:
        """Share of the decoder's prefill FLOPs that pruning saves, 0..1."""
        return 1.0 - self.pruned / self.full if self.full else 0.0


@dataclass(frozen=True)
class Report:
    """Numbers of the latest prefill and the decoding after it.

    ``visual_tokens`` is the mean per sample before pruning. ``kv_bytes`` is what the KV cache held after the latest prompt
    chunk, of the whole batch and with the text; of a static cache all it allocates. Decode steps that were compiled as
    a whole are neither timed nor counted: no hook runs in them.
    """

    visual_tokens: float
    stages: tuple[tuple[int, int, int], ...]
    tokens: TokenCounts
    flops: FlopCounts
    seconds: Seconds
    decode_steps: int
    kv_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        out = dataclasses.asdict(self)
        out["stages"] = [
            dict(zip(("layer", "tokens_in", "tokens_kept"), s, strict=True)) for s in self.stages
        ]
        out["flops"]["cut"] = self.flops.cut
        return out


Counts = tuple[tuple[int, ...], tuple[int, ...]]
"""Visual tokens of each sample that entered a stage, and that it kept."""


class Run:
    """The handle a pruning scope gives out. Describes the latest prefill: each new one starts it afresh.

    A text-only prompt is a prefill too. Chunked prefill is one prefill: its stages are those of the chunks put together,
    and its FLOPs those of the same rows in one call.
    """

    def __init__(self, parts: Parts, policy: PruningPolicy | None) -> None:
        self.policy = policy
        self.clock = Clock(next(parts.text.parameters()).device)
        self.stages: list[StageRecord] = []
        self.crops: tuple[int, ...] = ()
        self._parts = parts
        self.encoded = 0  # how many of the crops belong to prefills that are over
        self._visual: list[Tensor] = []  # one mask a chunk
        self._batch = self._before = self._length = 0
        self._cached = True
        self._counts: dict[int, Counts] = {}
        self.kv_bytes = 0  # what the cache held after the latest chunk; the hooks say it
        self._rows: dict[int, int] = {}

    def begin(
        self, batch: int, length: int, visual: Tensor | None, cached: bool, crops: tuple[int, ...] | None
    ) -> None:
        """A prefill starts (called by the hooks).

        ``crops`` are the patches of every crop encoded ahead of it; None = all crops since the latest prefill that had
        images (chunks of a prompt do not say).
        """
        self.clock.begin()
        self.crops = self.crops[self.encoded :] if crops is None else crops
        self.stages, self._rows, self._counts, self.encoded = [], {}, {}, 0
        self._batch, self._before, self._length, self._cached = batch, 0, length, cached
        self._visual = [] if visual is None else [visual]

    def extend(self, length: int, visual: Tensor | None) -> None:
        """Another chunk of the prompt starts (called by the hooks)."""
        self.clock.extend()
        self._before, self._length = self._length, self._length + length
        if visual is not None:
            self._visual.append(visual)
        else:
            self._rows = {layer: rows + length for layer, rows in self._rows.items()}

    def record(self, layer: int, layout: Layout, index: Tensor, after: Layout) -> None:
        """A stage has chosen (called by the hooks); ``layout`` became ``after``."""
        positions, ordinals = take(layout.positions(), index), take(layout.ordinals, index)
        if not layout.ordered:
            positions, ordinals = ascending(positions), ascending(ordinals)
        now = StageRecord(layer, layout.columns.shape[1], index.shape[1], positions, ordinals)
        counts = (layout.counts, after.counts)
        if self._before:
            now, counts = self._joined(now, counts)
        self.stages = [s for s in self.stages if s.layer != layer] + [now]
        self._rows[layer] = self._rows.get(layer, self._before) + after.rows
        self._counts[layer] = counts

    def _joined(self, now: StageRecord, counts: Counts) -> tuple[StageRecord, Counts]:
        """A chunk's stage together with the same stage of the chunks before it."""
        index = torch.where(now.index >= 0, now.index + self._before, -1)
        old = next((s for s in self.stages if s.layer == now.layer), None)
        if old is None:
            return dataclasses.replace(now, index=index), counts
        entered, held = (
            tuple(map(sum, zip(a, b, strict=True)))
            for a, b in zip(self._counts[now.layer], counts, strict=True)
        )
        kept = max(held)
        index = ascending(torch.cat([old.index, index], 1))[:, :kept]
        ordinals = ascending(torch.cat([old.ordinals, now.ordinals], 1))[:, :kept]
        return StageRecord(now.layer, max(entered), kept, index, ordinals), (entered, held)

    def kept(self, sample: int = 0) -> Tensor:
        """Numbers (prompt order, 0-based) of one sample's visual tokens that survive the last stage, 1-D int64."""
        return self.kept_at(len(self.stages) - 1, sample)

    def kept_at(self, stage: int, sample: int = 0) -> Tensor:
        """The same after stage number ``stage`` (0-based; -1 = before any, all of them)."""
        check(0 <= sample < max(self._batch, 1), "sample", f"0..{max(self._batch, 1) - 1}", sample)
        check(-1 <= stage < len(self.stages), "stage", f"-1..{len(self.stages) - 1}", stage)
        if stage >= 0:
            row = self.stages[stage].ordinals[sample]
            return row[row >= 0]
        return torch.arange(self._visual_counts()[sample] if self._batch else 0)

    def report(self) -> Report:
        """Tokens, FLOPs and seconds of the latest prefill and what followed. Waits for the device."""
        depth = len(self._parts.layers)
        full = max(sum(self._visual_counts()) / max(self._batch, 1), 0.0)
        after = [(s.layer, _mean_count(s.index)) for s in self.stages]
        visual = layer_inputs(depth, full, after)
        rows = layer_inputs(depth, self._length, list(self._rows.items()))
        shape = decoder_shape(self._parts.config)
        mean = sum(visual) / depth
        compact = self.policy is not None and self.policy.earlier_kv == "compact"
        resident = visual[-1] if compact else mean
        return Report(
            visual_tokens=full,
            stages=tuple((s.layer, s.tokens_in, s.tokens_kept) for s in self.stages),
            tokens=TokenCounts(mean, visual[-1], resident if self._cached else 0.0),
            flops=FlopCounts(
                full=self._batch * decoder_flops(shape, [self._length] * depth),
                pruned=self._batch * decoder_flops(shape, rows),
                vision=vision_flops(self._parts, self.crops) if full else 0,
            ),
            seconds=self.clock.seconds() if full else dataclasses.replace(self.clock.seconds(), vision=0.0),
            decode_steps=max(self.clock.count - 1, 0),
            kv_bytes=self.kv_bytes,
        )

    def _visual_counts(self) -> list[int]:
        counts = [0] * self._batch
        for visual in self._visual:
            counts = [n + more for n, more in zip(counts, visual.sum(1).tolist(), strict=True)]
        return counts


def _mean_count(index: Tensor) -> float:
    """Mean number of real entries per sample."""
    return float((index >= 0).sum().item()) / max(index.shape[0], 1)
