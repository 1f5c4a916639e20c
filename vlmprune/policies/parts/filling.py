"""A fixed number of tokens of every crop: what is chosen, then evenly spaced ones, then leftovers in a drawn order (ACCM)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import counting, remembered
from vlmprune.errors import check
from vlmprune.policies.base import Positions, PruningPolicy, Ranking, Reduction, TokenContext
from vlmprune.policies.by_image import quota_of, ranked
from vlmprune.policies.checks import check_share, check_whole
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Groups, Kind
from vlmprune.policies.parts.outlying import outliers
from vlmprune.policies.parts.relevance import most_relevant

TEXT = {288: 150, 144: 70, 72: 40, 36: 20, 18: 12}
"""The authors' budgets, and how many tokens of each the question chooses."""

Turns = Callable[[Kind], tuple[Tensor, Tensor]]
"""Of the crops of one kind when each token's turn to be kept is, and its place among those found: ``[i, N]`` int64 each, the
lower the sooner."""


class InTurn(PruningPolicy):
    """Keeps of every crop the tokens whose turn comes first, in raster order, or as "selected" in that of their places."""

    order: Literal["raster", "selected"]
    positions: Positions

    def turns(self, ctx: TokenContext, crops: Groups) -> Turns:
        """What decides."""
        raise NotImplementedError(f"{type(self).__name__}: expected `turns` of its own, got none")

    def ranks(self, layer: int) -> bool:
        return super().ranks(layer) and self.order == "raster"

    def rank(self, ctx: TokenContext) -> Ranking:
        """The same tokens in any order."""
        crops = crops_of(ctx)
        if not crops.tokens:
            return Ranking(ctx.mask.float(), ctx.counts)
        turn, _ = crops.by_kind(quota_of(ctx, self, crops), self.turns(ctx, crops))
        last = 3 * max(crops.tokens)
        return ranked(ctx, self, crops.spread(-turn.float(), fill=-last), self.positions)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        if self.order == "raster":
            return super().select(ctx)
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        quota, turns = quota_of(ctx, self, crops), self.turns(ctx, crops)

        def found(kind: Kind) -> tuple[Tensor]:
            turn, place = turns(kind)
            index, _ = ops.select_topk(-turn.float(), kind.kept)
            return (index.gather(1, place.gather(1, index).argsort(dim=1)),)

        (index,) = crops.by_kind(quota, found)
        return Reduction(crops.index(index, quota), None, self.positions)


def check_text(text: object, keep: float) -> None:
    """``text`` is a share, a float in [0, 1], a number of tokens, an int of ``keep`` at most if that is a number, or None."""
    if isinstance(text, float):
        check_share("text", text)
    elif text is not None:
        check_whole("text", text, 0)
        assert isinstance(text, int)
        fits = isinstance(keep, float) or text <= keep
        check(fits, "text", f"at most keep, which is {keep}", text)


def asked_for(text: int | float | None, kept: int) -> int:
    """How many of ``kept`` tokens of an image the question chooses: a number, a share, or None for the authors' own.

    Example:
        >>> asked_for(None, 72), asked_for(0.5, 72), asked_for(100, 72)
        (40, 36, 72)
    """
    if text is None:
        return TEXT.get(kept, round(kept * 5 / 9))
    return int(text * kept + 1e-6) if isinstance(text, float) else min(kept, text)


def filling(
    crops: Groups,
    attention: Tensor,
    relevance: Tensor | None,
    quota: Callable[[int], int],
    seed: int,
    last: bool,
) -> Turns:
    """The most relevant tokens and the outliers of attention come first, then those that fill up, from N and 2 N on.

    Args:
        crops: those of the context.
        attention: ``[I, N]``.
        relevance: ``[B, N]`` of all visual tokens; None = no token is chosen by it.
        quota: of how many tokens that stay of a crop how many are chosen by relevance.
        seed: draws the order of the leftovers.
        last: of more chosen tokens than stay the last ones do; else the relevant ones, then outliers by falling attention.
    """
    said = None if relevance is None else crops.split(relevance)

    def turns(kind: Kind) -> tuple[Tensor, Tensor]:
        paid = crops.take(attention, kind)
        N, (outlier, rank) = paid.shape[1], outliers(paid)
        asked = torch.zeros_like(outlier)
        if said is not None:
            asked = most_relevant(crops.take(said, kind), quota(kind.kept))
        chosen, at = asked | outlier, counting(1, N, paid.device)
        place = places(chosen, kind.kept, at, shuffled(seed, N, paid.device))
        first = N - 1 - at if last else rank.masked_fill(asked, -1)
        return torch.where(chosen, first, place), place

    return turns


def places(chosen: Tensor, kept: int, at: Tensor, leftover: Tensor) -> Tensor:
    """Places ``[I, N]`` int64: the chosen in raster order, from N on those evenly spaced, from 2 N on the leftovers.

    The evenly spaced fit: every ``ceil(N / missing)``-th of N is at most as many as are missing. How many are chosen is data,
    so it stays on the device.
    """
    N = at.shape[1]
    missing = (kept - chosen.sum(1, keepdim=True)).clamp(min=1)
    step = (N + missing - 1) // missing
    return torch.where(chosen, at, torch.where(at % step == 0, N + at, 2 * N + leftover))


@remembered()
def shuffled(seed: int, tokens: int, device: torch.device) -> Tensor:
    """The numbers below ``tokens`` in an order that the seed draws: ``[1, tokens]`` int64."""
    # On the CPU whatever the device: generators of different devices draw different numbers.
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[None].to(device)
