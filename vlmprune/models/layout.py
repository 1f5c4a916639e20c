"""Where the visual tokens of a prompt are, before and after each stage: rows, positions, ordinals (docs/prefill.md)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmprune import ops


@dataclass(frozen=True)
class Layout:
    """The rows of hidden states present at some depth, and which of them are visual tokens.

    Attributes:
        length: number of rows n (physical sequence length) per sample.
        visual: ``[B, N]`` rows of the visual tokens, ascending, -1 = padding on the right.
        ordinals: ``[B, N]`` each visual token's number in the prompt before any pruning, -1 = padding.
        counts: visual tokens per sample, on the host.
        real: rows per sample that are no padding, on the host.
        valid: ``[B, n]`` False = padding row; None = no padding.
        origin: ``[B, n]`` position of each row in the prompt before any pruning, -1 = padding; None = unpruned.
        ordered: False if an earlier stage rearranged the visual tokens, so that ordinals no longer ascend.
        trailing: whether some sample's tokens are followed by padding.
        end: ``[B, 1]`` position (unpruned) at which the prompt ends and candidates of assisted decoding begin; None =
            there are none.
    """

    length: int
    visual: Tensor
    ordinals: Tensor
    counts: tuple[int, ...]
    real: tuple[int, ...]
    valid: Tensor | None
    origin: Tensor | None
    ordered: bool = True
    trailing: bool = False
    end: Tensor | None = None

    def prompt(self) -> Tensor | None:
        """``[B, n]`` False at padding and at candidates; None = every row is the prompt's."""
        if self.end is None:
            return self.valid
        order = torch.arange(self.length, device=self.end.device) if self.origin is None else self.origin
        inside = (order >= 0) & (order < self.end)
        return inside if self.valid is None else inside & self.valid

    def positions(self) -> Tensor:
        """``[B, N]`` position of each visual token in the unpruned prompt, -1 = padding."""
        return self.visual if self.origin is None else take(self.origin, self.visual)


T = TypeVar("T")


def moved(record: T, device: torch.device) -> T:
    """A dataclass with its tensors on a device: a model's layers may be spread over several."""
    own = {f.name: getattr(record, f.name) for f in fields(record)}  # type: ignore[arg-type]
    away = {name: x for name, x in own.items() if isinstance(x, Tensor) and x.device != device}
    pairs = {name: x for name, x in own.items() if isinstance(x, tuple) and x and isinstance(x[0], Tensor)}
    new: dict[str, Any] = {name: x.to(device) for name, x in away.items()}
    new |= {name: tuple(t.to(device) for t in x) for name, x in pairs.items() if x[0].device != device}
    return replace(record, **new) if new else record  # type: ignore[type-var]


def take(values: Tensor, index: Tensor) -> Tensor:
    """``values[b, index[b, j]]``, and -1 where the index is -1."""
    if values.shape[1] == 0:
        return torch.full_like(index, -1)
    return torch.where(index >= 0, values.gather(1, index.clamp(min=0)), -1)


def positions_of(marked: Tensor, width: int) -> Tensor:
    """Positions ``[B, width]`` of the True entries of ``marked [B, n]``, ascending, -1 on the right; no host sync."""
    code = torch.where(marked, 1, 2).to(torch.int8)
    blank = torch.zeros(marked.shape, dtype=torch.float32, device=marked.device)
    return ops.select_topk(blank, 0, code=code)[0][:, :width]


def open_layout(visual: Tensor, padding: Tensor | None, known: int | None, tail: int = 0) -> Layout:
    """Layout of an unpruned prompt chunk.

    Args:
        visual: ``[B, q]`` True at visual tokens.
        padding: ``[B, q]`` False at padding, or None if there is none.
        known: number of visual tokens of a batch of one, when it is known without asking the device.
        tail: candidates behind the prompt; what precedes the last visual token is the prompt in any case.
    """
    batch, q = visual.shape
    if batch == 1 and padding is None and known is not None:
        counts, real, ends = (known,), (q,), (True,)
    else:
        valid = torch.ones_like(visual) if padding is None else padding
        # the one host read of a padded prefill
        per_sample = torch.stack([visual.sum(1), valid.sum(1), valid[:, -1] | ~valid.any(1)])
        counts, real, ends = map(tuple, per_sample.tolist())
    rows = positions_of(visual, max(counts))
    order = torch.arange(rows.shape[1], device=rows.device)
    return Layout(
        length=q,
        visual=rows,
        ordinals=torch.where(rows >= 0, order, -1),
        counts=counts,
        real=real,
        valid=None if all(n == q for n in real) else padding,
        origin=None,
        trailing=not all(ends),
        end=(rows.amax(1, keepdim=True) + 1).clamp(min=q - tail) if tail and max(counts) else None,
    )


@dataclass(frozen=True)
class TextSpan:
    """The text after the last image: ``mask [B, q]`` in the unpruned prompt, the most of any sample, and how far from
    the prompt's end the farthest of it lies."""

    mask: Tensor
    width: int
    reach: int


def find_text(visual: Tensor, prompt: Tensor | None) -> TextSpan:
    """Find the text after each sample's last image. Its extent is data: one host read."""
    q = visual.shape[1]
    order = torch.arange(q, device=visual.device)
    last_visual = torch.where(visual, order, -1).amax(1, keepdim=True)
    mask = (order > last_visual) & (last_visual >= 0)
    if prompt is not None:
        mask = mask & prompt
    width, reach = torch.stack([mask.sum(1).max(), torch.where(mask, q - order, 0).max()]).tolist()
    return TextSpan(mask, width, reach)


def text_rows(layout: Layout, text: TextSpan) -> Tensor:
    """``[B, T]`` row numbers of the text after the last image in a layout, -1 = padding."""
    mask = text.mask.to(layout.visual.device)
    if layout.origin is not None:
        mask = (layout.origin >= 0) & mask.gather(1, layout.origin.clamp(min=0))
    return positions_of(mask, text.width)


def ascending(index: Tensor) -> Tensor:
    """``index [B, K]`` sorted, its -1 padding still on the right."""
    last = torch.iinfo(index.dtype).max
    index = torch.where(index >= 0, index, last).sort(dim=1).values
    return torch.where(index < last, index, -1)


def rearrange(layout: Layout, after: Layout, survivors: Tensor, index: Tensor) -> tuple[Layout, Tensor]:
    """``shorten``'s result with the visual rows in the order of ``index [B, K]`` instead of ascending."""
    n = survivors.shape[1]
    at = torch.where(after.visual >= 0, after.visual, n)
    spare = survivors.new_full((len(survivors), 1), -1)  # takes what belongs to padding, and is cut off
    survivors = torch.cat([survivors, spare], 1).scatter(1, at, take(layout.visual, index))[:, :n]
    origin = survivors if layout.origin is None else take(layout.origin, survivors)
    return replace(after, origin=origin, ordinals=take(layout.ordinals, index), ordered=False), survivors


def packed_rows(first: Layout, after: Layout) -> Tensor:
    """``[B, n]`` the unpruned rows whose positions a layout gets when it is packed, -1 = padding.

    Padding may stand anywhere among the unpruned rows: in a further turn it follows the last answer's last token.
    """
    order = torch.arange(after.length, device=after.visual.device).expand(len(after.counts), -1)
    if after.valid is not None:
        order = torch.where(after.valid, after.valid.cumsum(1) - 1, -1)
    return order if first.valid is None else take(positions_of(first.valid, max(first.real)), order)


def put_rows(short: Tensor, rows: Tensor, contents: Tensor) -> Tensor:
    """``short [B, n, D]`` with ``contents [B, K, D]`` in its rows ``rows [B, K]``; -1 = padding."""
    n, width = short.shape[1:]
    at = torch.where(rows >= 0, rows, n)[..., None].expand(-1, -1, width)
    spare = torch.cat([short, torch.zeros_like(short[:, :1])], 1)
    return spare.scatter(1, at, contents.to(short))[:, :n]


def last_rows(layout: Layout) -> Tensor:
    """``[B, 1]`` row number of each prompt's newest token; padding may stand on either side of it."""
    prompt = layout.prompt()
    if prompt is None:
        return torch.full((layout.visual.shape[0], 1), layout.length - 1, device=layout.visual.device)
    order = torch.arange(layout.length, device=layout.visual.device)
    return torch.where(prompt, order, -1).amax(1, keepdim=True)


def shorten(layout: Layout, index: Tensor, kept: tuple[int, ...]) -> tuple[Layout, Tensor]:
    """The layout after a stage that keeps visual tokens ``index [B, K]``, and the rows ``[B, n']`` that survive.

    Samples that keep fewer rows than others are padded on the LEFT (-1), so that the last row stays the newest token.
    """
    real = tuple(r - c + k for r, c, k in zip(layout.real, layout.counts, kept, strict=True))
    length = max(real)
    visual = take(layout.visual, index)
    survivors = positions_of(_surviving(layout, visual), length)
    if min(real) < length:
        survivors = _align_right(survivors, torch.tensor(real).to(index.device, non_blocking=True))
    origin = survivors if layout.origin is None else take(layout.origin, survivors)
    new = Layout(
        length=length,
        visual=_renumber(survivors, visual, layout.length),
        ordinals=take(layout.ordinals, index),
        counts=kept,
        real=real,
        valid=None if min(real) == length else survivors >= 0,
        origin=origin,
        ordered=layout.ordered,
        end=layout.end,
    )
    return new, survivors


def _surviving(layout: Layout, kept: Tensor) -> Tensor:
    """``[B, n]`` True for rows that stay: text, and the rows ``kept [B, K]`` of visual tokens; padding goes."""
    batch, n = layout.visual.shape[0], layout.length
    stay = torch.ones(
        batch, n + 1, dtype=torch.bool, device=layout.visual.device
    )  # row n takes the -1 entries
    if layout.valid is not None:
        stay[:, :n] = layout.valid
    stay.scatter_(1, torch.where(layout.visual >= 0, layout.visual, n), False)
    stay.scatter_(1, torch.where(kept >= 0, kept, n), True)
    return stay[:, :n]


def _align_right(rows: Tensor, count: Tensor) -> Tensor:
    """Move the -1 padding of ``rows [B, n]`` from the right to the left."""
    n = rows.shape[1]
    source = torch.arange(n, device=rows.device) - (n - count)[:, None]
    return take(rows, source.clamp(min=-1))


def _renumber(survivors: Tensor, rows: Tensor, length: int) -> Tensor:
    """Where ``rows [B, K]`` of ``length`` ones stand once the survivors are gathered."""
    batch, n = survivors.shape
    where = torch.full((batch, length + 1), -1, dtype=torch.int64, device=survivors.device)
    order = torch.arange(n, device=survivors.device).expand(batch, -1)
    where.scatter_(1, torch.where(survivors >= 0, survivors, length), order)
    return take(where[:, :length], rows)
