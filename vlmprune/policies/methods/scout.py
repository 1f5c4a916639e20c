"""Scout: a coarse view of the image says where to look, and the tokens found there run after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import InputError, check
from vlmprune.policies.base import (
    Growth,
    Needs,
    PruningPolicy,
    Ranking,
    Reduction,
    TokenContext,
)
from vlmprune.policies.checks import (
    check_flag,
    check_keep,
    check_seed,
    check_whole,
    check_word,
    is_number,
    share_of,
)
from vlmprune.policies.choose import marks, quotas
from vlmprune.policies.compose import check_member
from vlmprune.policies.counts import keep_count
from vlmprune.policies.growth import worst
from vlmprune.policies.methods.divprune import DivPrune
from vlmprune.policies.methods.random import drawn
from vlmprune.policies.parts.blur import blurred

NOMINAL = 576
"""Visual tokens of one image (LLaVA-1.5's), by which ``at`` tells how coarse and fine share a budget."""

SPREADS = 0.25, 1000.0
"""Narrower a Gaussian is 0 in float32 within a few tokens, wider it is the same for all of them."""

FIRST = 1e3
"""What a token that is there is worth to the DPP, where others are worth 1 at most: squared, more than rounding takes."""


@dataclass(frozen=True)
class Scout(PruningPolicy):
    """Looks at a coarse set of tokens first, and takes in as many fine ones where the prompt looks.

    Early layers do not know where to look, late ones know but save little. A coarse view is enough to know where:

    1. The text and what ``coarse`` keeps run layers 0..look-1, at their own positions.
    2. The attention of the last prompt row in layer look-1, head mean, is spread over the grid of each image (a Gaussian).
       It names ``fine`` more tokens, the best of all images of a prompt together.
    3. These and the text behind the last image run layers 0..look-1 over keys and values of the first run. Coarse tokens,
       and text in front of the last image, are not run again: there, and only there, they do not see the fine ones.

    From ``look`` on, and in the answer, all of it is one sequence under the usual causal mask; every layer holds coarse and
    fine tokens. It costs what keeping both from layer 0 costs, and the text behind the image once more in ``look`` layers.

    Args:
        coarse: a policy that acts before the language model alone and only drops tokens (diverse ones, where nothing is
            said: ``studies/where_to_look``); whatever it does with positions, they stay the tokens' own.
        fine: tokens that join: a share (float) of all visual tokens, or a number per image (int).
        look: the first layer that sees coarse and fine tokens; those before it are run in two waves. At least 1; where the
            attention has come to depend on the question, as ``vlmprune tune`` measures (the default is for 32 layers).
        by: what names fine tokens: "attention" alone; "diverse", attention among tokens unlike the coarse ones and one
            another (greedy MAP of a DPP with the kernel ``a_i cos_ij a_j`` of spread attention and projected features, in
            which the coarse tokens stand already); or "random" (a baseline).
        spread: standard deviation of the Gaussian, in rows and columns of visual tokens, from 0.25 to 1000.
        rope: whether the attention is the model's; False = its query and keys without RoPE, softmax over the coarse tokens.
        seed: which draw "random" is; 0 if not given.

    Raises:
        InputError: a setting is out of range; where it runs, a coarse policy that merges or moves tokens.
    """

    summary = "a coarse view first, then as many fine tokens where the prompt looks"
    paper = "this project"
    formula = (
        "C = what coarse keeps at layer 0;  a_i = mean_h A[look-1][h, last, i] for i ∈ C  (rope=True)\n"
        "b_j = ∑_{i ∈ C} a_i exp(-d_ij² / (2 spread²)), d_ij = distance in one grid, in rows and columns\n"
        "L_ij = b_i cos(e_i, e_j) b_j\n"
        "k(fine) times: bring back the j for which det L[C ∪ back ∪ j] is highest  (by='diverse')\n"
        "those then run layers 0 … look - 1 as well, and the text behind the last image again"
    )

    coarse: PruningPolicy = DivPrune(keep=0.125)  # noqa: RUF009  # frozen
    fine: int | float = 0.0833
    look: int = 20
    by: Literal["attention", "diverse", "random"] = "diverse"
    spread: float = 1.0
    rope: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        check(isinstance(self.coarse, PruningPolicy), "coarse", "a policy", repr(self.coarse))
        check(self.coarse.layers == (0,), "coarse", "a policy with one stage, at layer 0", repr(self.coarse))
        plain = not (self.coarse.inserts or self.coarse.restores or self.coarse.empties(0))
        check(plain, "coarse", "a policy that only drops tokens, and keeps some", repr(self.coarse))
        check_member(self, self.coarse, "coarse")
        check_keep(self.fine, "fine")
        check_whole("look", self.look, 1, " (the layers before it look)")
        check_word("by", self.by, "attention", "diverse", "random")
        ok = is_number(self.spread) and SPREADS[0] <= self.spread <= SPREADS[1]
        check(ok, "spread", "a number from {:g} to {:g}".format(*SPREADS), repr(self.spread))
        check_flag("rope", self.rope)
        if self.by == "random":
            object.__setattr__(self, "seed", 0 if self.seed is None else self.seed)
            check_seed(self.seed)
        check(self.by == "random" or self.seed is None, "seed", "None where nothing is drawn", self.seed)

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, self.look)

    @property
    def growth(self) -> Growth | None:
        """That of the coarse policy, or of a DPP; spreading scores over a square image is n^1.5, and a small part of it."""
        return worst((self.coarse.growth, "n^3" if self.by == "diverse" else "n"))

    @property
    def fixed_count(self) -> bool:
        return self.coarse.fixed_count

    def needs(self, layer: int) -> Needs:
        if layer == 0:
            return self.coarse.needs(0)
        attention: Literal["previous"] | None = None if self.by == "random" else "previous"
        return Needs(attention=attention, rows="last", embeds=self.by == "diverse", restored=True, wave=True)

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
        scores = self._scores(ctx, max(keep))
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

    def _scores(self, ctx: TokenContext, kept: int) -> Tensor:
        """float32 ``[B, N]``, the higher joins first, where ``kept`` stay; what the coarse tokens have is not read."""
        if self.by == "random" or ctx.ran is None:
            return drawn(self.seed or 0, ctx.counts, ctx.device)
        looked = self._looked(ctx, ctx.ran)
        if self.by == "attention":
            return looked
        embeds = ctx.given("embeds")
        image = ctx.given("image")
        rows = image.gather(1, ctx.ordinals.clamp(min=0)).masked_fill(~ctx.mask, -1)
        features = ops.gather_tokens([embeds], rows)[0]
        return apart(looked, features, marks(ctx.ran, ctx.mask.shape[1]), ctx.mask, kept)

    def _looked(self, ctx: TokenContext, ran: Tensor) -> Tensor:
        """float32 ``[B, N]``: the attention that coarse tokens received, spread to those around them."""
        seen = ctx.given("attention")
        if self.rope:
            received = seen.received(seen.last)
        else:
            seen = seen.chunk()
            received = seen.received(seen.last, normalize="columns", unrotated=True)
        return blurred(received, ran, ctx.grids, self.spread, ctx.mask.shape[1])

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
        if share == 1.0:  # then nothing is left for a second wave
            return replace(self, coarse=self.coarse.at(1.0))
        return replace(self, coarse=self.coarse.at(share * part), fine=share * (1 - part))

    def forget(self) -> None:
        self.coarse.forget()


def apart(scores: Tensor, features: Tensor, there: Tensor, mask: Tensor, kept: int) -> Tensor:
    """Scores that rank tokens as a DPP takes them one by one, when some are there already.

    Args:
        scores: float32 ``[B, N]``, what a token is worth by itself, at least 0.
        features: ``[B, N, D]``.
        there: bool ``[B, N]``, in the set from the start. Those that the others span to within rounding, as equal tokens do,
            are as if they were not: they add nothing.
        mask: bool ``[B, N]``, False = padding.
        kept: at most so many are in the set in the end, those that are there among them.

    Returns:
        float32 ``[B, N]``: the larger the earlier a token is taken; 0 = not at all, or it was there, or is padding.
    """
    N = mask.shape[1]
    if not kept:
        return torch.zeros_like(scores)
    own = scores.nan_to_num(0.0, 0.0, 0.0).masked_fill(there | ~mask, 0.0)
    own = own / own.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # The op sees the tokens by what they are worth: where nothing new is left all tie, and the first ones are taken.
    best = own.masked_fill(there | ~mask, -1.0).argsort(dim=1, descending=True, stable=True)
    features, worth = ops.gather_tokens([features, own.masked_fill(there, FIRST)], best)
    order = ops.greedy_select(features, kept, "dpp", relevance=worth, mask=mask.gather(1, best))[1]
    order = torch.where(order < 0, N, best.gather(1, order.clamp(min=0)))
    rank = torch.arange(kept, 0, -1, device=order.device, dtype=torch.float32).expand_as(order)
    return rank.new_zeros(len(order), N + 1).scatter(1, order, rank)[:, :N].masked_fill(there, 0.0)
