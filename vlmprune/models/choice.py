"""A policy's choice carried out; the rows whose logits are needed stay, whatever was chosen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune import ops
from vlmprune.models.joining import Rotary, join
from vlmprune.models.layout import (
    Layout,
    ascending,
    last_rows,
    put,
    rearrange,
    shorten,
    spread,
    take,
    where_true,
)
from vlmprune.models.prefill import Decision, Entering
from vlmprune.policies.base import Reduction

Counts = tuple[int, ...]


def carry_out(
    choice: Tensor | Reduction,
    entering: Entering,
    counts: Counts | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor, Decision | None]:
    """The rows ``[B, n, D]`` that a choice leaves, the numbers of its tokens, and the decision; None = everything stays.

    ``counts`` says how many tokens of each sample it keeps, where that is known without a look; ``rotary`` makes tables for
    positions that have none yet.
    """
    layout, hidden, shift = entering.layout, entering.hidden, entering.shift
    with torch.no_grad():
        choice, kept = settle(layout, choice, hidden, entering.predicting, counts)
        merges = isinstance(choice, Reduction)
        numbers = ascending(choice.index) if isinstance(choice, Reduction) else choice
        if kept == layout.counts and not merges:
            return hidden, numbers, None
        after, survivors = shorten(layout, numbers, kept)
    if not isinstance(choice, Reduction):
        short, cos, sin = ops.gather_tokens([hidden, *entering.rope], survivors)  # one launch
        # detached: else checkpointed layers would share a graph through them
        return short, numbers, Decision(after, survivors, (cos.detach(), sin.detach()), shift)
    after, survivors = rearrange(layout, after, survivors, choice.index)
    texts = None
    if choice.inserted is not None:
        texts = join(layout, after, survivors, choice.inserted)
        after, survivors = texts.layout, texts.survivors
    if choice.positions == "pack":
        rope, shift = entering.packed(after)
    elif texts is not None:
        rope, shift = texts.rope(entering.places, hidden, rotary), texts.shift
    else:
        cos, sin = ops.gather_tokens([*entering.rope], survivors)
        rope = cos, sin
    made = Decision(after, survivors, rope, shift, choice.hidden, merged=choice.merged)
    if texts is not None:
        made = made._replace(joined=texts.rows, inserted=choice.inserted)
    return apply(made, hidden), numbers, made


def apply(made: Decision, hidden: Tensor) -> Tensor:
    """The rows that survive, with new contents where the policy made some."""
    short = ops.gather_tokens([hidden], made.survivors)[0]
    if made.contents is not None:
        short = put(short, made.layout.visual, made.contents)
    if made.joined is not None and made.inserted is not None:
        short = put(short, made.joined, made.inserted.hidden)
    return short


def settle(
    layout: Layout,
    choice: Tensor | Reduction,
    hidden: Tensor,
    predicting: Tensor | None,
    counts: Counts | None = None,
) -> tuple[Tensor | Reduction, Counts]:
    """A choice whose rows can answer, and how many tokens of each sample it keeps.

    A visual token that ends the prompt is the row generation goes on from; in training, a label right behind an image is
    predicted by the image's last row. Where such a token was dropped it takes the place of the last one kept.

    Args:
        layout: the rows that enter the stage.
        choice: the policy's.
        hidden: ``[B, n, D]`` the rows.
        predicting: ``[B, q]`` True at positions from which a label is predicted, or None.
        counts: how many it keeps; None = to be read.
    """
    chosen = choice.index if isinstance(choice, Reduction) else choice
    if predicting is None:
        new, last = _with_newest(layout, chosen)
    else:
        new, last = _with_predicting(layout, chosen, predicting.to(chosen.device)), None
    kept = (new.shape[1],) if new.shape[0] == 1 else counts or tuple((new >= 0).sum(1).tolist())
    if not isinstance(choice, Reduction):
        return new if predicting is None else ascending(new), kept
    contents = choice.hidden
    if contents is not None:
        wider = new.shape[1] - chosen.shape[1]
        own = (new != pad(chosen, (0, wider), value=-1))[..., None]
        other = (
            take(layout.visual, new) if predicting is not None else last_rows(layout)
        )  # the only one there can be
        rows = ops.gather_tokens([hidden], other)[0]
        contents = torch.where(own, rows.to(contents), pad(contents, (0, 0, 0, wider)))
    if last is not None:  # the row generation goes on from sees all others
        order = (last + 2 * (new < 0)).argsort(dim=1, stable=True)
        new = new.gather(1, order)
        contents = None if contents is None else _reordered(contents, order)
    return replace(choice, index=new, hidden=contents), kept


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """Rows ``order [B, K]`` of ``x [B, K, D]``."""
    if len(x) == 1:  # whole rows, which an index of the shape of x would not let PyTorch know
        return x.index_select(1, order[0])
    return x.gather(1, order[..., None].expand_as(x))


def _with_newest(layout: Layout, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    """The visual token that ends a prompt in the place of the last one kept, and where it is ``[B, K]``. No host read."""
    if chosen.shape[1] == 0:
        return chosen, None
    newest = (layout.visual >= 0).sum(1, keepdim=True) - 1
    ends = (newest >= 0) & (take(layout.visual, newest) == last_rows(layout))
    new = torch.where(ends & (chosen == chosen.amax(1, keepdim=True)), newest, chosen)
    return new, ends & (new == newest)


def _with_predicting(layout: Layout, chosen: Tensor, predicting: Tensor) -> Tensor:
    """The tokens from which a label is predicted in the places of the last ones kept; more places where there are too few.

    Host reads: this is training.
    """
    at = layout.positions
    needed = (at >= 0) & predicting.gather(1, at.clamp(min=0))
    missing = needed & ~spread(chosen, torch.ones_like(chosen, dtype=torch.bool), needed.shape[1])
    most = int(missing.sum(1).max())
    if most == 0:
        return chosen
    chosen = pad(chosen, (0, most), value=-1)
    others = torch.where(chosen < 0, -1, torch.where(needed.gather(1, chosen.clamp(min=0)), -2, chosen))
    # The last others, then empty places.
    spare = others.argsort(dim=1, descending=True, stable=True)[:, :most]
    tokens = where_true(missing, most)
    new = chosen.scatter(1, spare, torch.where(tokens >= 0, tokens, chosen.gather(1, spare)))
    return new[:, : int((new >= 0).sum(1).max())]
