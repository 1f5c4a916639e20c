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
    """Visual tokens, mean per sample: over the decoder layers' inputs, after the last stage, and held in the KV cache (mean per layer)."""

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
    """Numbers of the latest prefill and the decoding after it. ``visual_tokens`` is the mean per sample before pruning."""

    visual_tokens: float
    stages: tuple[tuple[int, int, int], ...]
    tokens: TokenCounts
    flops: FlopCounts
    seconds: Seconds
    decode_steps: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        out = dataclasses.asdict(self)
        out["stages"] = [
            dict(zip(("layer", "tokens_in", "tokens_kept"), s, strict=True)) for s in self.stages
        ]
        out["flops"]["cut"] = self.flops.cut
        return out


class Run:
    """The handle a pruning scope gives out. Describes the latest prefill: each new one starts it afresh.

    A text-only prompt is a prefill too; so with classifier-free guidance the unconditional pass is what it describes.
    """

    def __init__(self, parts: Parts, policy: PruningPolicy | None) -> None:
        self.policy = policy
        self.clock = Clock(next(parts.text.parameters()).device)
        self.stages: list[StageRecord] = []
        self._parts = parts
        self._visual: Tensor | None = None
        self._batch = self._length = 0
        self._cached = True
        self._rows: list[tuple[int, int]] = []

    def begin(self, batch: int, length: int, visual: Tensor | None, cached: bool) -> None:
        """A prefill starts (called by the hooks)."""
        self.clock.begin()
        if visual is None:
            self.clock.vision = []
        self.stages, self._rows = [], []
        self._batch, self._length, self._visual, self._cached = batch, length, visual, cached

    def record(self, layer: int, layout: Layout, index: Tensor, rows: int) -> None:
        """A stage has chosen (called by the hooks); ``rows`` is the sequence length after it."""
        positions, ordinals = take(layout.positions(), index), take(layout.ordinals, index)
        if not layout.ordered:
            positions, ordinals = ascending(positions), ascending(ordinals)
        tokens_in, tokens_kept = layout.columns.shape[1], index.shape[1]
        self.stages.append(StageRecord(layer, tokens_in, tokens_kept, positions, ordinals))
        self._rows.append((layer, rows))

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
        rows = layer_inputs(depth, self._length, self._rows)
        shape = decoder_shape(self._parts.config)
        mean = sum(visual) / depth
        images = sum(self._visual_counts()) // (self._parts.grid[0] * self._parts.grid[1])
        return Report(
            visual_tokens=full,
            stages=tuple((s.layer, s.tokens_in, s.tokens_kept) for s in self.stages),
            tokens=TokenCounts(mean, visual[-1], mean if self._cached else 0.0),
            flops=FlopCounts(
                full=self._batch * decoder_flops(shape, [self._length] * depth),
                pruned=self._batch * decoder_flops(shape, rows),
                vision=images * vision_flops(self._parts.config),
            ),
            seconds=self.clock.seconds(),
            decode_steps=max(self.clock.count - 1, 0),
        )

    def _visual_counts(self) -> list[int]:
        if self._visual is None:
            return [0] * self._batch
        return self._visual.sum(1).tolist()


def _mean_count(index: Tensor) -> float:
    """Mean number of real entries per sample."""
    return float((index >= 0).sum().item()) / max(index.shape[0], 1)
