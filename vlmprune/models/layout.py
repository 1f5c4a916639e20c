"""Where the visual tokens of a prompt are, before and after each stage: rows, positions, ordinals (docs/prefill.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmprune.constants import whole_numbers
from vlmprune.ops.select_topk import positions_of
from vlmprune.policies.inputs import AttentionInputs


@dataclass(eq=False)  # nobody writes to one; frozen, it would take a stage 2 us longer to make
class Layout:
    """The rows of hidden states present at some depth, and which of them are visual tokens.

    Attributes:
        length: rows n of each sample, padding included.
        visual: ``[B, N]`` rows of the visual tokens, ascending, -1 = padding on the right.
        counts: visual tokens per sample, on the host.
        real: rows per sample that are no padding, on the host.
        valid: ``[B, n]`` False = padding row; None = no padding.
        origin: ``[B, n]`` position of each row in the prompt before any pruning, -1 = padding; None = unpruned.
        before: the layout that a stage has shortened and the numbers ``[B, N]`` of the tokens it kept; None = unpruned.
        first: ``[B, 1]`` ordinal of the first visual token, in a later chunk of a prompt; None = 0.
        ordered: False if an earlier stage rearranged the visual tokens, so that ordinals no longer ascend.
        trailing: whether some sample's tokens are followed by padding.
        hidden: whether some visual token is padding to the attention mask.
        end: ``[B, 1]`` position (unpruned) at which the prompt ends and candidates of assisted decoding begin; None =
            there are none.
        bound: whether ``real`` is only the most there can be, as in a captured prefill: which rows are padding, all of it on
            the right, the device alone knows.
    """

    length: int
    visual: Tensor
    counts: tuple[int, ...]
    real: tuple[int, ...]
    valid: Tensor | None
    origin: Tensor | None
    before: tuple[Layout, Tensor] | None = None
    first: Tensor | None = None
    ordered: bool = True
    trailing: bool = False
    hidden: bool = False
    end: Tensor | None = None
    bound: bool = False

    def prompt(self) -> Tensor | None:
        """``[B, n]`` False at padding and at candidates; None = every row is the prompt's."""
        if self.end is None:
            return self.valid
        order = torch.arange(self.length, device=self.end.device) if self.origin is None else self.origin
        inside = (order >= 0) & (order < self.end)
        return inside if self.valid is None else inside & self.valid

    # Made when somebody looks: most methods and reports never do.

    @cached_property
    def positions(self) -> Tensor:
        """``[B, N]`` position of each visual token in the unpruned prompt, -1 = padding."""
        return self.visual if self.origin is None else take(self.origin, self.visual)

    @cached_property
    def ordinals(self) -> Tensor:
        """``[B, N]`` of the visual tokens, -1 = padding."""
        if self.before is not None:
            layout, numbers = self.before
            return take(layout.ordinals, numbers)
        order = torch.arange(self.visual.shape[1], device=self.visual.device)
        return torch.where(self.visual >= 0, order if self.first is None else order + self.first, -1)

    @cached_property
    def start(self) -> Tensor:
        """``[B, 1]`` each sample's first row that is no padding."""
        if self.valid is None:
            return self.visual.new_zeros(len(self.counts), 1)
        return self.valid.long().argmax(1, keepdim=True).to(self.visual.device)

    @cached_property
    def mask(self) -> Tensor:
        """``[B, N]`` False at the padding of ``visual``."""
        return self.visual >= 0


T = TypeVar("T")


def moved(record: T, device: torch.device) -> T:
    """A record, tuple or dict with its tensors, which are all in one place, on a device: a model's layers may be spread over several."""
    sample = _SAMPLES.get(type(record), _first)(record)  # every stage asks, for two of these
    return record if sample is None or sample.device == device else _moved(record, device)


_SAMPLES: dict[type, Callable[[Any], Tensor]] = {
    Layout: attrgetter("visual"),
    AttentionInputs: attrgetter("query"),
}


def _first(record: object) -> Tensor | None:
    """The first tensor there is."""
    if isinstance(record, Tensor):
        return record
    if isinstance(record, tuple):
        parts: Iterable[object] = record
    elif isinstance(record, dict):
        parts = record.values()
    else:
        parts = vars(record).values() if is_dataclass(record) else ()
    for part in parts:
        found = _first(part)
        if found is not None:
            return found
    return None


def _moved(record: T, device: torch.device) -> T:
    if isinstance(record, Tensor):
        return record.to(device)  # type: ignore[return-value]
    if isinstance(record, tuple):
        return tuple(_moved(x, device) for x in record)  # type: ignore[return-value]
    if isinstance(record, dict):
        return {name: _moved(x, device) for name, x in record.items()}  # type: ignore[return-value]
    if not is_dataclass(record):
        return record
    return replace(record, **{f.name: _moved(getattr(record, f.name), device) for f in fields(record)})  # type: ignore[type-var]


def take(values: Tensor, at: Tensor) -> Tensor:
    """``values[b, at[b, j]]``, and -1 where that is -1."""
    if values.shape[1] == 0:
        return torch.full_like(at, -1)
    return torch.where(at >= 0, values.gather(1, at.clamp(min=0)), -1)


def put(into: Tensor, rows: Tensor, contents: Tensor) -> Tensor:
    """``into [B, n, ...]`` with ``contents [B, K, ...]`` in its rows ``rows [B, K]``; -1 = padding."""
    spare = into.new_zeros(len(into), 1, *into.shape[2:])  # takes what belongs to padding, and is cut off
    return _scattered(torch.cat([into, spare], 1), rows, contents.to(into))


def spread(rows: Tensor, contents: Tensor, length: int, fill: int = 0, padded: bool = True) -> Tensor:
    """``[B, length, ...]`` of ``fill`` with ``contents [B, K, ...]`` in its rows ``rows [B, K]``; -1 = padding, if there is any."""
    if not padded:
        at = rows.view(*rows.shape, *(1,) * (contents.ndim - 2)).expand_as(contents)
        return contents.new_full((len(rows), length, *contents.shape[2:]), fill).scatter_(1, at, contents)
    return _scattered(contents.new_full((len(rows), length + 1, *contents.shape[2:]), fill), rows, contents)


def _scattered(into: Tensor, rows: Tensor, contents: Tensor) -> Tensor:
    """Write ``contents`` into rows of ``into``, a fresh tensor with one row more than is returned."""
    n, width = into.shape[1] - 1, contents.ndim - 2
    at = torch.where(rows >= 0, rows, n)
    if len(into) == 1:  # whole rows, which an index of the contents' shape would not let PyTorch know
        return into.index_copy_(1, at[0], contents)[:, :n]
    return into.scatter_(1, at.view(*rows.shape, *(1,) * width).expand_as(contents), contents)[:, :n]


def inverse(rows: Tensor, length: int) -> Tensor:
    """``[B, length]`` which entry of ``rows [B, n]`` (or of positions) each of 0 ... length - 1 is, -1 = none."""
    order = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return spread(rows, order, length, fill=-1)


def where_true(marked: Tensor, width: int) -> Tensor:
    """Where ``marked [B, n]`` is True, ``[B, width]`` ascending, -1 on the right; no host sync."""
    return positions_of(marked, width)


def open_layout(visual: Tensor, padding: Tensor | None, known: int | None, tail: int = 0) -> Layout:
    """Layout of an unpruned prompt chunk.

    Args:
        visual: ``[B, q]`` True at visual tokens.
        padding: ``[B, q]`` False at padding, or None if there is none.
        known: visual tokens of a batch of one, when it is known without asking the device.
        tail: candidates behind the prompt; what precedes the last visual token is the prompt in any case.
    """
    batch, q = visual.shape
    if batch == 1 and padding is None and known is not None:
        counts, real, ends, seen = (known,), (q,), (True,), (known,)
    else:
        valid = torch.ones_like(visual) if padding is None else padding
        # the one host read of a padded prefill
        ends_so = valid[:, -1] | ~valid.any(1)
        per_sample = torch.stack([visual.sum(1), valid.sum(1), ends_so, (visual & valid).sum(1)])
        counts, real, ends, seen = map(tuple, per_sample.tolist())
    rows = where_true(visual, max(counts))
    return Layout(
        length=q,
        visual=rows,
        counts=counts,
        real=real,
        valid=None if all(n == q for n in real) else padding,
        origin=None,
        trailing=not all(ends),
        hidden=seen != counts,
        end=(rows.amax(1, keepdim=True) + 1).clamp(min=q - tail) if tail and max(counts) else None,
    )


def open_bound(visual: Tensor, rows: Tensor, counts: tuple[int, ...]) -> Layout:
    """Layout of an unpruned prompt whose samples begin on the left: ``visual [B, n]``, ``rows [B, n]`` -1 at the padding behind."""
    batch, n = visual.shape
    at = where_true(visual, max(counts))
    return Layout(
        length=n, visual=at, counts=counts, real=(n,) * batch, valid=rows >= 0, origin=None, bound=True
    )


def ascending(numbers: Tensor) -> Tensor:
    """``numbers [B, K]`` (or positions, or ordinals) sorted, the -1 padding still on the right."""
    last = torch.iinfo(numbers.dtype).max
    numbers = torch.where(numbers >= 0, numbers, last).sort(dim=1).values
    return torch.where(numbers < last, numbers, -1)


def rearrange(layout: Layout, after: Layout, survivors: Tensor, numbers: Tensor) -> tuple[Layout, Tensor]:
    """``shorten``'s result with the visual rows in the order of the ``numbers [B, K]`` instead of ascending."""
    survivors = put(survivors, after.visual, take(layout.visual, numbers))
    origin = survivors if layout.origin is None else take(layout.origin, survivors)
    return replace(after, origin=origin, before=(layout, numbers), ordered=False), survivors


def packed_rows(first: Layout, after: Layout) -> Tensor:
    """``[B, n]`` the unpruned rows whose positions a layout gets when it is packed, -1 = padding.

    Padding may stand anywhere among the unpruned rows: in a further turn it follows the last answer's last token.
    """
    order = torch.arange(after.length, device=after.visual.device).expand(len(after.counts), -1)
    if after.valid is not None:
        order = torch.where(after.valid, after.valid.cumsum(1) - 1, -1)
    return order if first.valid is None else take(where_true(first.valid, max(first.real)), order)


def last_rows(layout: Layout) -> Tensor:
    """``[B, 1]`` the row of each prompt's newest token; padding may stand on either side of it."""
    prompt = layout.prompt()
    if prompt is None:
        return torch.full((layout.visual.shape[0], 1), layout.length - 1, device=layout.visual.device)
    order = torch.arange(layout.length, device=layout.visual.device)
    return torch.where(prompt, order, -1).amax(1, keepdim=True)


def shorten(layout: Layout, numbers: Tensor, kept: tuple[int, ...]) -> tuple[Layout, Tensor]:
    """The layout after a stage that keeps the visual tokens of these ``numbers [B, K]``, and the rows ``[B, n']`` that survive.

    Samples that keep fewer rows than others are padded on the LEFT (-1), so that the last row stays the newest token (where
    only the device knows how many those are, on the right).
    """
    real = tuple(r - c + k for r, c, k in zip(layout.real, layout.counts, kept, strict=True))
    length, visual = max(real), take(layout.visual, numbers)
    n = layout.length  # one row more takes the -1 entries
    stay = torch.ones(len(real), n + 1, dtype=torch.bool, device=numbers.device)
    if layout.valid is not None:
        stay[:, :n] = layout.valid
    for rows, stays in (
        (layout.visual, False),
        (visual, True),
    ):  # text stays, and visual tokens that are kept
        stay.scatter_(1, torch.where(rows >= 0, rows, n), stays)
    survivors = where_true(stay[:, :n], length)
    if min(real) < length and not layout.bound:
        blanks = length - whole_numbers(real, numbers.device)[:, None]
        survivors = take(survivors, (torch.arange(length, device=numbers.device) - blanks).clamp(min=-1))
    new = Layout(
        length=length,
        visual=take(inverse(survivors, layout.length), visual),
        before=(layout, numbers),
        counts=kept,
        real=real,
        valid=None if min(real) == length and not layout.bound else survivors >= 0,
        origin=survivors if layout.origin is None else take(layout.origin, survivors),
        ordered=layout.ordered,
        end=layout.end,
        bound=layout.bound,
    )
    return new, survivors
