"""Methods of two waves: coarse tokens run the layers up to one by themselves, then fine ones join them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

from torch import Tensor

from vlmprune.errors import InputError, check
from vlmprune.policies.base import PruningPolicy, Ranking, Reduction, TokenContext
from vlmprune.policies.checks import check_keep, check_whole, share_of
from vlmprune.policies.choose import marks, quotas
from vlmprune.policies.compose import check_member
from vlmprune.policies.counts import keep_count

NOMINAL = 576
"""Visual tokens of one image (LLaVA-1.5's), by which ``at`` tells how coarse and fine share a budget."""


class TwoWaves(PruningPolicy):
    """What ``coarse`` keeps runs layers 0..look-1; ``fine`` more of all tokens, per image or a share, join at ``look``.

    Which they are a method says by ``worth``; its ``needs`` at ``look`` are those of a wave that brings tokens back.
    """

    coarse: PruningPolicy
    fine: int | float
    look: int

    def __post_init__(self) -> None:
        check(isinstance(self.coarse, PruningPolicy), "coarse", "a policy", repr(self.coarse))
        check(self.coarse.layers == (0,), "coarse", "a policy with one stage, at layer 0", repr(self.coarse))
        plain = not (self.coarse.inserts or self.coarse.restores or self.coarse.empties(0))
        check(plain, "coarse", "a policy that only drops tokens, and keeps some", repr(self.coarse))
        check_member(self, self.coarse, "coarse")
        check_keep(self.fine, "fine")
        check_whole("look", self.look, 1, " (the layers before it look)")

    def worth(self, ctx: TokenContext, ran: Tensor, kept: int) -> Tensor:
        """float32 ``[B, N]``, the higher joins first, where ``kept`` stay; what the coarse tokens ``ran`` have is not read."""
        raise NotImplementedError(f"{type(self).__name__}: expected a `worth` of its own, got none")

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, self.look)

    @property
    def fixed_count(self) -> bool:
        return self.coarse.fixed_count

    def ranks(self, layer: int) -> bool:
        return layer > 0 or self.coarse.ranks(0)

    def rank(self, ctx: TokenContext) -> Ranking:
        """The coarse policy's ranking, but for positions; later the coarse tokens before all others, and the best of those."""
        if ctx.layer == 0:
            return replace(self.coarse.rank(ctx), positions="keep")
        if ctx.ran is None or ctx.ran_counts is None:
            return Ranking(ctx.mask.float(), ctx.counts)
        if self.fixed_count:
            keep = tuple(map(max, quotas(ctx, self), ctx.ran_counts))
        else:
            more = zip(ctx.counts, ctx.ran_counts, quotas(ctx, self.fine), strict=True)
            keep = tuple(min(n, ran + fine) for n, ran, fine in more)
        scores = self.worth(ctx, ctx.ran, max(keep))
        return Ranking(scores.masked_fill(marks(ctx.ran, ctx.mask.shape[1]), float("inf")), keep)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        if ctx.layer > 0 or self.coarse.ranks(0):
            return super().select(ctx)
        choice = self.coarse.select(ctx)
        if not isinstance(choice, Reduction):
            return choice
        plain = choice.hidden is None and choice.inserted is None and choice.merged is None
        if not plain:
            raise InputError(f"coarse: expected a policy that only drops tokens, got {self.coarse!r}")
        return choice.index

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Coarse tokens; from ``look`` on ``fine`` more."""
        coarse = self.coarse.kept(tokens, images, 0)
        return coarse if layer == 0 else min(tokens, coarse + keep_count(self.fine, tokens, images))

    def spends(self, layer: int) -> str:
        return self.coarse.spends(0)  # behind it, too, that counts are exact where images differ in size

    def at(self, share: float) -> Self:
        """Coarse and fine together at this share of the tokens, which they divide as they do now (of 576); all at 1.0."""
        share, both = share_of(share), self.kept(NOMINAL, 1, self.look)
        part = self.coarse.kept(NOMINAL, 1, 0) / both
        check(part < 1, "fine", f"room for it beside {self.coarse!r}", self.fine)
        change: dict[str, Any] = {"coarse": self.coarse.at(1.0)}
        if share < 1.0:  # else nothing is left for a second wave
            change = {"coarse": self.coarse.at(share * part), "fine": share * (1 - part)}
        return replace(self, **change)

    def forget(self) -> None:
        self.coarse.forget()
