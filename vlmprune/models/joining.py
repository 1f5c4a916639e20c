"""Texts that join a prompt at a stage: rows among those that stay, in the places of tokens that were dropped.

Each row so has an origin of its own in the unpruned prompt, as every other row has: what comes after (scattering back to the
prompt's length, compacting, later stages) need not know of texts. Lists on the host: whoever writes texts has read the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmprune.errors import ModelError, check
from vlmprune.models.layout import Layout, take
from vlmprune.models.prefill import Rope
from vlmprune.policies.base import Insertion

Rotary = Callable[[Tensor, Tensor], Rope]
"""``(hidden, positions [B, n])`` to cos and sin."""


@dataclass(frozen=True)
class Joined:
    """The rows of a stage with texts among them.

    Attributes:
        layout: the rows.
        survivors: ``[B, n]`` the rows before the stage; of a text's rows those in whose places they stand. -1 = padding.
        rows: ``[B, C]`` of the texts, -1 = padding.
        source: ``[B, n]`` the row before the stage whose position counts: of a text's rows that in front of which it goes.
        ahead: ``[B, n]`` how many rows of texts stand before each row.
        shift: by how much later positions move down: up, therefore less than 0.
    """

    layout: Layout
    survivors: Tensor
    rows: Tensor
    source: Tensor
    ahead: Tensor
    shift: tuple[int, ...]

    def rope(self, places: Tensor | None, hidden: Tensor, rotary: Rotary | None) -> Rope:
        """cos and sin of the rows where each keeps its position, moved up by the texts before it."""
        if places is None or rotary is None:
            raise ModelError(
                "position_ids: expected those of the prompt at its first decoder layer, got None"
            )
        at = take(places.expand(len(self.source), -1), self.source)
        cos, sin = rotary(hidden, torch.where(at >= 0, at + self.ahead, 0))
        return cos, sin


def join(layout: Layout, after: Layout, survivors: Tensor, texts: Insertion) -> Joined:
    """Put texts among the rows ``survivors [B, n]`` that a stage leaves of ``layout``; ``after`` is their layout.

    Raises:
        InputError: a text that goes behind the prompt, or texts with more rows than tokens of their sample are dropped.
    """
    check(layout.origin is None, "inserted", "the first stage of a prompt", "a later one")
    device, made = survivors.device, []
    for b, (old, kept) in enumerate(zip(layout.visual.tolist(), survivors.tolist(), strict=True)):
        rows = [row for row in kept if row >= 0]
        dropped = sorted(set(old) - {-1} - set(rows))
        wanted = [*zip(texts.before[b], texts.sizes[b], strict=True)]
        needed = sum(size for _, size in wanted)
        check(
            needed <= len(dropped),
            f"inserted, sample {b}",
            f"{len(dropped)} rows at most, one for a token that goes (none that predicts a label does)",
            needed,
        )
        last = max(at for at, _ in wanted) if wanted else 0
        check(not wanted or last <= max(rows), f"inserted.before, sample {b}", "places in its prompt", last)
        made.append(_line(rows, wanted, dropped[len(dropped) - needed :]))
    width = max(len(line) for line, _, _, _ in made)
    blanks = [width - len(line) for line, _, _, _ in made]
    places, source, ahead = (
        torch.tensor([[fill] * n + row for n, row in zip(blanks, rows, strict=True)], device=device)
        for fill, rows in zip((-1, -1, 0), list(zip(*made, strict=True))[:3], strict=True)
    )
    longest = max(map(sum, texts.sizes))
    joined = [[n + i for i in own] for n, (*_, own) in zip(blanks, made, strict=True)]
    joined = [row + [-1] * (longest - len(row)) for row in joined]
    new = _layout(layout, after, survivors, places, texts.sizes)
    shift = tuple(-sum(own) for own in texts.sizes)
    return Joined(new, places, torch.tensor(joined, device=device, dtype=torch.int64), source, ahead, shift)


def _line(
    rows: list[int], texts: list[tuple[int, int]], spare: list[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """One sample's rows with its texts, each ``(before, size)``.

    Returns:
        The rows before the stage, those whose positions count, how many rows of texts stand before each, and the places of
        these.
    """
    line: list[int] = []
    source: list[int] = []
    ahead: list[int] = []
    joined: list[int] = []
    waiting = list(texts)
    for row, place in zip(
        rows, sorted(rows), strict=True
    ):  # a stage may rearrange what it keeps, within its places
        while waiting and waiting[0][0] <= place:
            before, size = waiting.pop(0)
            start = len(joined)
            joined += range(len(line), len(line) + size)
            line += spare[start : start + size]
            source += [before] * size
            ahead += range(start, start + size)
        line.append(row)
        source.append(row)
        ahead.append(len(joined))
    return line, source, ahead, joined


def _layout(
    layout: Layout, after: Layout, survivors: Tensor, places: Tensor, sizes: Sequence[Sequence[int]]
) -> Layout:
    """That of the rows ``places [B, n]``, where ``after`` was that of the rows without texts."""
    order = torch.arange(places.shape[1], device=places.device).expand_as(places)
    now = torch.full((len(places), layout.length + 1), -1, device=places.device)  # where each row stands now
    now.scatter_(1, torch.where(places >= 0, places, layout.length), order)
    real = tuple(n + sum(own) for n, own in zip(after.real, sizes, strict=True))
    return replace(
        after,
        length=places.shape[1],
        visual=take(now[:, : layout.length], take(survivors, after.visual)),
        real=real,
        valid=None if min(real) == places.shape[1] else places >= 0,
        origin=places,
    )
