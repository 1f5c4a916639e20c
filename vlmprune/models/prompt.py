"""One prompt as far as it has come, and what its stages kept: chunked prefill hands it over in several calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vlmprune.models.call import Call
from vlmprune.models.clock import Clock, Marks
from vlmprune.models.layout import Layout, ascending, take
from vlmprune.policies.base import Insertion

Counts = tuple[int, ...]
"""Visual tokens of each sample, on the host."""


class Chosen(NamedTuple):
    """Which tokens a stage kept of one chunk of a prompt.

    Attributes:
        layout: the rows that entered.
        numbers: ``[B, K]`` of the tokens that stayed, -1 = padding; None = all.
        start: position of the chunk in the prompt.
    """

    layout: Layout
    numbers: Tensor | None
    start: int

    def of(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Entries of ``tokens [B, N]`` (positions, ordinals) that stayed, ascending, counted from ``start``."""
        some = tokens if self.numbers is None else take(tokens, self.numbers)
        some = some if self.layout.ordered else ascending(some)
        return torch.where(some >= 0, some + start, -1) if start else some


@dataclass(eq=False)  # nobody writes to one; frozen, it would take longer to make
class StageRecord:
    """One stage of the latest prefill. Its lists are made when somebody looks.

    Attributes:
        layer: the first decoder layer that saw the shortened sequence.
        entered, kept: visual tokens of each sample that entered and survived.
        path: how it ran: as one fused pass and on which kernels, or why not.
    """

    layer: int
    entered: Counts
    kept: Counts
    path: str
    chunks: tuple[Chosen, ...] = field(repr=False)

    @property
    def tokens_in(self) -> int:
        """Visual tokens entering, of the sample with the most."""
        return max(self.entered)

    @property
    def tokens_kept(self) -> int:
        """Visual tokens surviving, of the sample with the most."""
        return max(self.kept)

    @cached_property
    def index(self) -> Tensor:
        """``[B, tokens_kept]`` int64 positions in the prompt of the survivors, ascending, -1 = padding."""
        return self._joined([chosen.of(chosen.layout.positions, chosen.start) for chosen in self.chunks])

    @cached_property
    def ordinals(self) -> Tensor:
        """``[B, tokens_kept]`` int64, the same tokens' ordinals among the prompt's visual tokens."""
        return self._joined([chosen.of(chosen.layout.ordinals) for chosen in self.chunks])

    def _joined(self, lists: list[Tensor]) -> Tensor:
        return (lists[0] if len(lists) == 1 else ascending(torch.cat(lists, 1)))[:, : self.tokens_kept]

    def after(self, earlier: StageRecord) -> StageRecord:
        """This chunk's stage together with the same stage of the chunks before it."""
        entered, kept = (
            tuple(map(sum, zip(a, b, strict=True)))
            for a, b in ((earlier.entered, self.entered), (earlier.kept, self.kept))
        )
        return StageRecord(self.layer, entered, kept, self.path, earlier.chunks + self.chunks)


class SecondWave(NamedTuple):
    """A second wave that has run (``Needs(wave=True)``).

    Attributes:
        layer: the stage before which it ran the layers.
        rows: of each sample, those of tokens that came back and those behind its last image.
        width: rows of the batch, padding included.
        keys: rows that it could see, padding included, without the cached past.
    """

    layer: int
    rows: Counts
    width: int
    keys: int


@dataclass
class Prompt:
    """What is known of one prefill, and of the decoding after it. Made by the hooks, read by ``Run``.

    Attributes:
        batch: samples.
        start: tokens in the cache before the prompt.
        length: tokens of its chunks so far; ``before``, of those before the latest one.
        marks: when what happened.
        stages: what each stage kept, by layer.
        rows: rows that entered each stage's layer and all after it, by stage layer.
        visual: of each chunk with visual tokens how many there are, or the mask ``[B, q]`` that says it.
        crops: patches of every crop encoded for it.
        kv_bytes: what the cache held after the latest chunk; None = there is no cache.
        inserted: the texts that joined it.
        second_wave: None = none has run.
        graph: whether its latest chunk was a graph's replay, or why not; "" = nobody asked.
    """

    batch: int = 0
    start: int = 0
    length: int = 0
    marks: Marks = field(default_factory=Marks)
    before: int = 0
    stages: dict[int, StageRecord] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    visual: list[Tensor | Counts] = field(default_factory=list)
    crops: tuple[int, ...] = ()
    kv_bytes: int | None = None
    inserted: Insertion | None = None
    second_wave: SecondWave | None = None
    graph: str = ""

    def extend(self, call: Call) -> None:
        """A chunk starts, perhaps the first one."""
        self.before, self.length = self.length, self.length + call.length
        if call.visual is not None:
            self.visual.append(call.visual)
        else:
            self.rows = {layer: rows + call.length for layer, rows in self.rows.items()}

    def count(self, counts: Counts) -> Counts:
        """The latest chunk's visual tokens are counted; returns those of the chunks before it."""
        self.visual[-1] = counts
        return tuple(a - b for a, b in zip(self.visual_counts(), counts, strict=True))

    def visual_counts(self) -> Counts:
        """Visual tokens of each sample so far. Waits for the device where nobody has counted them yet."""
        chunks = [x.sum(1).tolist() if isinstance(x, Tensor) else x for x in self.visual]
        return tuple(map(sum, zip(*chunks, strict=True))) if chunks else (0,) * self.batch

    def record(self, layer: int, layout: Layout, numbers: Tensor | None, after: Layout, path: str) -> None:
        """A stage has chosen the tokens of these ``numbers``, None = all; ``layout`` became ``after``."""
        chosen = Chosen(layout, numbers, self.before)
        now = StageRecord(layer, layout.counts, after.counts, path, (chosen,))
        earlier = self.stages.pop(layer, None) if self.before else None
        self.stages[layer] = now if earlier is None else now.after(earlier)
        self.rows[layer] = self.rows.get(layer, self.before) + after.length


class Prompts:
    """The latest prompt, and those under way, by the cache they fill. A copied or saved model starts without any."""

    def __init__(self) -> None:
        self.latest = Prompt()
        self.filling: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return Prompts, ()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, call: Call, clock: Clock) -> Prompt | None:
        """The prompt that a call begins, or is a further chunk of; None where there is none to describe.

        A single token without a past (the unconditional pass of classifier-free guidance) is no prompt to describe;
        candidates that follow a prompt are no further chunk of it.
        """
        visuals, cache = call.visuals, call.cache
        whole = call.logits > 1 or (visuals is not None and not visuals.cut)
        known = None if cache is None else self.filling.get(cache)
        follows = known is not None and (call.batch, call.past) == (known.batch, known.start + known.length)
        if known is not None and follows and not whole:
            prompt = known
            clock.go_on(known.marks)
        elif visuals is not None or (call.past == 0 and (call.length > 1 or cache is not None)):
            self.latest = prompt = Prompt(call.batch, call.past, marks=clock.begin())
            if cache is not None:
                self.filling[cache] = prompt
        else:
            return known
        prompt.extend(call)
        return prompt
