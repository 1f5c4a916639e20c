"""How tokens are chosen: each sample's count, the best scores, and a kept set in its two forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import PruningPolicy, Ranking, TokenContext
from vlmprune.policies.counts import keep_count

FLOOR = torch.finfo(torch.float32).min
"""Below every score, but above what does not compete."""


def quotas(ctx: TokenContext, keep: float | PruningPolicy) -> list[int]:
    """How many tokens each sample keeps at this stage, on the host: what a policy says, a share or a number per image.

    Example:
        >>> ctx.counts, quotas(ctx, 0.5), quotas(ctx, 3)  # samples of one image and of two
        ((4, 8), [2, 4], [3, 6])
    """
    counts = zip(ctx.counts, ctx.image_counts(), strict=True)
    if isinstance(keep, int | float):
        return [keep_count(keep, tokens, images) for tokens, images in counts]
    if keep.spends(ctx.layer) != "prompt" and ctx.whole:  # exactly, where images differ in size
        return [sum(keep.kept(n, 1, ctx.layer) for n in own) for own in ctx.images()]
    return [keep.kept(tokens, images, ctx.layer) for tokens, images in counts]


def select_scores(scores: Tensor, ctx: TokenContext, keep: float | PruningPolicy) -> Tensor:
    """``select_counts`` for what a policy says, a share (float) or a number per image (int).

    Example:
        >>> select_scores(torch.arange(8.0).expand(2, 8), ctx, 0.5)
        tensor([[ 2,  3, -1, -1],
                [ 4,  5,  6,  7]])
    """
    return select_counts(scores, ctx, quotas(ctx, keep))


def select_counts(scores: Tensor, ctx: TokenContext, kept: Sequence[int]) -> Tensor:
    """Numbers ``[B, K]`` of the ``kept[b]`` best-scored entering tokens, ascending, -1 on the right; no host sync.

    Ties go to the lower number and NaN ranks below everything, so a sample of broken scores keeps its first tokens.

    Args:
        scores: ``[B, N]``, the higher survives; padding may hold anything.
        ctx: the stage's context.
        kept: one number per sample, at most ``ctx.counts``.

    Example:
        >>> select_counts(torch.arange(8.0).expand(2, 8), ctx, [1, 2])
        tensor([[ 3, -1],
                [ 6,  7]])
    """
    return Ranking(scores, tuple(kept)).index(ctx)


def best_among(scores: Tensor, count: int | Tensor, among: Tensor | None) -> Tensor:
    """Places ``[G, P]`` of the ``count`` best of ``scores [G, P]``, ascending, -1 on the right; no host sync.

    Args:
        scores: ``[G, P]``, the higher survives; ties go to the lower place, NaN ranks below everything.
        count: how many of each row, an int or ``[G]`` int64.
        among: ``[G, P]`` bool, the tokens that compete, others go; None = all do.

    Example:
        >>> best_among(torch.tensor([[3.0, 1, 2]]), 1, torch.tensor([[False, True, True]]))
        tensor([[ 2, -1, -1]])
    """
    code = None if among is None else torch.where(among, 0, 2).to(torch.int8)
    return ops.select_topk(scores, count, code=code)[0]


def padding(tokens: Sequence[int], mask: Tensor) -> Tensor | None:
    """``mask``, or None where all rows are as full as it is wide."""
    return None if all(n == mask.shape[1] for n in tokens) else mask


def choose_greedily(
    rule: str,
    kept: Sequence[int],
    mask: Tensor | None,
    features: Tensor,
    relevance: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """``ops.greedy_select`` with its own count ``kept[b]`` for every row: ``[B, K]`` ascending, -1 on the right.

    The first choices do not depend on how many follow, so the rows share one run as long as the longest. ``threshold`` is that
    of "nms".
    """
    K, N = max(kept, default=0), features.shape[1]
    index, order = ops.greedy_select(features, K, rule, relevance=relevance, threshold=threshold, mask=mask)
    if len(set(kept)) <= 1:
        return index
    quota = whole_numbers(tuple(kept), order.device)
    late = torch.arange(K, device=order.device) >= quota[:, None]
    index = order.masked_fill(late, N).sort(dim=1).values
    return index.masked_fill(index == N, -1)


def choose_relevant(
    kept: Sequence[int], mask: Tensor | None, features: Tensor, relevance: Tensor, spread: Tensor
) -> Tensor:
    """``choose_greedily`` by "dpp", whose ties go to the more relevant token, and of those to the one of larger ``spread``.

    The op sees the tokens in that order. So where tokens tie at the start, or the kernel's rank is used up and all that is
    left ties at zero, what is taken is no matter of numbering.

    Args:
        kept: one number per row.
        mask: ``[G, P]`` bool, False = padding; None = no padding.
        features: ``[G, P, D]``.
        relevance: ``[G, P]`` float32; NaN and infinities are none.
        spread: ``[G, P]``, of which the largest are spread evenly, however many (``lattice_scores`` with nothing kept).

    Returns:
        ``[G, K]`` ascending, -1 on the right.
    """
    weight = relevance.nan_to_num(0.0, 0.0, 0.0)
    if mask is not None:
        weight = weight.masked_fill(~mask, float("-inf"))
    order = spread.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, weight.gather(1, order).argsort(dim=1, descending=True, stable=True))
    features, relevance = ops.gather_tokens([features, relevance], order)
    found = choose_greedily("dpp", kept, None if mask is None else mask.gather(1, order), features, relevance)
    if found.shape[1] == 0:
        return found
    index = order.gather(1, found.clamp(min=0)).masked_fill(found < 0, order.shape[1]).sort(dim=1).values
    return index.masked_fill(index == order.shape[1], -1)


def falling_places(scores: Tensor, among: Tensor) -> Tensor:
    """The place of each of the tokens ``among [..., P]`` in falling order of ``scores [..., P]``, from 0; others come behind.

    Ties go to the lower place, NaN ranks below everything. The c best are those whose place is below c.

    Example:
        >>> falling_places(torch.tensor([[1.0, 5, 3, 9]]), torch.tensor([[True, True, True, False]]))
        tensor([[2, 0, 1, 3]])
    """
    order = scores.float().nan_to_num(FLOOR, -FLOOR, FLOOR).masked_fill(~among, float("-inf"))
    return order.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def rank_within(scores: Tensor, groups: Tensor) -> Tensor:
    """How many patches of its own group beat each patch ``[I, P]``; of equal ones the earlier beats the later."""
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, groups.gather(1, by_score).argsort(dim=1, stable=True))  # group by group
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    sorted_groups = groups.gather(1, order)
    starts = sorted_groups != sorted_groups.roll(
        1, 1
    )  # where all are one group the first stands for 0 anyway
    start = torch.where(starts, place, 0).cummax(1).values
    return torch.zeros_like(order).scatter(1, order, place - start)


def marks(index: Tensor, tokens: int) -> Tensor:
    """Turn an index ``[B, K]`` int64 (-1 = padding) into bool ``[B, tokens]``, True = kept.

    Example:
        >>> marks(torch.tensor([[0, 2]]), 4)
        tensor([[ True, False,  True, False]])
    """
    spare = torch.where(index < 0, tokens, index)  # padding lands in a column that is cut off again
    out = torch.zeros(index.shape[0], tokens + 1, dtype=torch.bool, device=index.device)
    return out.scatter_(1, spare, True)[:, :tokens]


def index_of(kept: Tensor) -> Tensor:
    """Turn marks ``[B, N]`` bool into an index ``[B, K]`` int64, ascending, -1 on the right.

    K is what the fullest sample keeps, which only the device knows: one host read.

    Example:
        >>> index_of(torch.tensor([[True, False, True], [False, True, False]]))
        tensor([[ 0,  2],
                [ 1, -1]])
    """
    index, count = _marked(kept)
    return index[:, : int(count.max())]


def others(index: Tensor, tokens: int) -> Tensor:
    """Places ``[I, tokens - k]`` that ``index [I, k]`` (no padding) leaves out, ascending."""
    return _marked(~marks(index, tokens))[0][:, : tokens - index.shape[1]]


def _marked(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Index ``[B, N]`` and count ``[B]`` of what is marked."""
    unranked = torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
    return ops.select_topk(unranked, 0, code=torch.where(kept, 1, 2).to(torch.int8))
