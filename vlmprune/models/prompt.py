"""One prompt as far as it has come, and what its stages kept: chunked prefill hands it over in several calls."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vlmprune.models.clock import Marks
from vlmprune.models.layout import Layout, ascending, take


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


Counts = tuple[tuple[int, ...], tuple[int, ...]]
"""Visual tokens of each sample that entered a stage, and that it kept."""


@dataclass
class Prompt:
    """What is known of one prefill, and of the decoding after it. Made by the hooks, read by ``Run``.

    Attributes:
        batch: samples.
        start: tokens in the cache before the prompt.
        length: tokens of its chunks so far; ``before``, of those before the latest one.
        marks: when what happened.
        stages: what each stage kept.
        counts: by stage layer.
        rows: rows that entered each stage's layer and all after it, by stage layer.
        visual: one mask ``[B, q]`` a chunk, True at visual tokens.
        seen: visual tokens of each sample in the chunks so far, where they were counted on the host.
        crops: patches of every crop encoded for it.
        kv_bytes: what the cache held after the latest chunk; None = there is no cache.
    """

    batch: int = 0
    start: int = 0
    length: int = 0
    marks: Marks = field(default_factory=Marks)
    before: int = 0
    stages: list[StageRecord] = field(default_factory=list)
    counts: dict[int, Counts] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    visual: list[Tensor] = field(default_factory=list)
    seen: tuple[int, ...] = ()
    crops: tuple[int, ...] = ()
    kv_bytes: int | None = None

    def goes_on(self, batch: int, past: int) -> bool:
        """Whether a call with this prompt's cache brings its next chunk."""
        return (batch, past) == (self.batch, self.start + self.length)

    def extend(self, length: int, visual: Tensor | None) -> None:
        """A chunk starts, perhaps the first one."""
        if self.length:
            self.marks.extend()
        self.before, self.length = self.length, self.length + length
        if visual is not None:
            self.visual.append(visual)
        else:
            self.rows = {layer: rows + length for layer, rows in self.rows.items()}

    def add(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Count a chunk's visual tokens per sample; returns those of the chunks before it."""
        before = self.seen or (0,) * len(counts)
        self.seen = tuple(a + b for a, b in zip(before, counts, strict=True))
        return before

    def record(self, layer: int, layout: Layout, index: Tensor, after: Layout) -> None:
        """A stage has chosen; ``layout`` became ``after``."""
        positions, ordinals = take(layout.positions(), index), take(layout.ordinals, index)
        if not layout.ordered:
            positions, ordinals = ascending(positions), ascending(ordinals)
        now = StageRecord(layer, layout.columns.shape[1], index.shape[1], positions, ordinals)
        counts = (layout.counts, after.counts)
        if self.before:
            now, counts = self._joined(now, counts)
        self.stages = [s for s in self.stages if s.layer != layer] + [now]
        self.rows[layer] = self.rows.get(layer, self.before) + after.rows
        self.counts[layer] = counts

    def _joined(self, now: StageRecord, counts: Counts) -> tuple[StageRecord, Counts]:
        """A chunk's stage together with the same stage of the chunks before it."""
        index = torch.where(now.index >= 0, now.index + self.before, -1)
        old = next((s for s in self.stages if s.layer == now.layer), None)
        if old is None:
            return dataclasses.replace(now, index=index), counts
        entered, held = (
            tuple(map(sum, zip(a, b, strict=True)))
            for a, b in zip(self.counts[now.layer], counts, strict=True)
        )
        kept = max(held)
        index = ascending(torch.cat([old.index, index], 1))[:, :kept]
        ordinals = ascending(torch.cat([old.ordinals, now.ordinals], 1))[:, :kept]
        return StageRecord(now.layer, max(entered), kept, index, ordinals), (entered, held)

    def visual_counts(self) -> list[int]:
        """Visual tokens of each sample. Waits for the device."""
        counts = [0] * self.batch
        for visual in self.visual:
            counts = [n + more for n, more in zip(counts, visual.sum(1).tolist(), strict=True)]
        return counts


class Prompts(WeakKeyDictionary[Any, Prompt]):
    """The prompts under way, by the cache they fill. A copied or saved model starts without any."""

    def __reduce__(self) -> Any:
        return Prompts, ()

    def __deepcopy__(self, memo: Any) -> Prompts:
        return Prompts()
