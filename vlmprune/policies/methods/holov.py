"""HoloV: quotas over runs of an image's raster, so that what stays comes from all of it; in a run the best by CLS attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from vlmprune.policies.base import Crop, Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import ranked, vision_of
from vlmprune.policies.checks import check_keep, check_number, check_whole
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Counts, Groups, places_of
from vlmprune.policies.parts.apportion import apportioned
from vlmprune.policies.parts.tiles import by_weight

SCALE, SMALL = 1e3, 1e-6
"""What attention is multiplied by, and what is added to divisors, in the released code."""
DIGITS = 1 << 16
"""Of a run's score: what is beyond is rounding, which must not decide between runs of the same values."""
RUNS = 1024 / 576
"""Runs for each token dropped to one in so many: 16 where 64 of 576 stay."""


@dataclass(frozen=True)
class HoloV(PruningPolicy):
    """Cuts an image's tokens, in raster order, into runs, gives each a quota by its score, and keeps its most attended tokens.

    A run's score is the mean of its tokens' scores: CLS attention, plus ``diversity`` times the variance of the token's
    cosines with the run's others, brought to the mean of the attention. (As its mean is brought there too, the score of a run
    comes to ``1 + diversity`` times its mean attention, unless its tokens hardly differ; this is what the released code
    computes.) Quotas are rounded down; the runs of highest score get what is left over, one token each in turn.

    Tiles and small view of an image are one raster, as they stand in the prompt, without newline tokens, which go. What a run
    cannot take goes to the others; the released code fills up with rows of zeros instead, and scores a run of a single token a
    thousand times lower. What stays is in raster order here, in falling order of attention within a run as released. A tower
    without CLS is scored by the mean attention a patch receives from all patches.

    Args:
        keep: tokens per image (int; published budgets 192, 128, 64) or share (float).
        runs: into how many an image is cut (16 for LLaVA, as released); None = by the budget, as for Qwen2.5-VL:
            ``1024 / 576`` times an image's tokens divided by those that stay, rounded down.
        diversity: weight of the variance, at least 0.
        vision_layer: vision-tower layer whose attention is read.
        positions: ``"keep"`` their own, or ``"pack"`` (released code for LLaVA: the kept tokens stand at 0, 1, 2, ...).
    """

    summary = "CLS attention within runs of the raster, quotas by attention and diversity"
    paper = (
        "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention (NeurIPS 2025), "
        "arXiv 2510.02912"
    )
    formula = (
        "a_j = 1000 · mean_h V[vision_layer][h, CLS, j];  an image's tokens in raster order are cut into runs\n"
        "in a run, m = its tokens:  c_ij = cos(x_i, x_j), c_jj = 0;  μ_j = Σ_i c_ij / (m - 1)\n"
        "d_j = Σ_i (c_ij - μ_j)² / (m - 1);  s_j = a_j + diversity · d_j · mean a / mean d of the run\n"
        "a run's quota is ⌊k · w / Σ_runs w⌋,  w = mean s_j of the run\n"
        "the runs of highest w get what is left over, one each\n"
        "in every run keep as many highest a_j as its quota says"
    )
    presets = each("keep={}", counts=",positions=pack") | {
        share: f"keep={share},runs=none" for share in (0.333, 0.222, 0.111)
    }
    growth = "n^2"  # every token is compared with the others of its run

    keep: int | float = 64
    runs: int | None = 16
    diversity: float = 0.09
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.runs is not None:
            check_whole("runs", self.runs, 1)
        check_number("diversity", self.diversity, least=0)
        check_whole("vision_layer", self.vision_layer)

    layers = (0,)  # before the language model
    spend = "image"

    def needs(self, layer: int) -> Needs:
        """Query and key of the vision layer, and the projected features."""
        return Needs(hidden=True, vision=(self.vision_layer,))

    def rank(self, ctx: TokenContext) -> Ranking:
        crops = crops_of(ctx)
        if not crops.tokens:
            return Ranking(ctx.mask.float(), ctx.counts)
        hidden = ctx.given("hidden")
        seen = vision_of(ctx, self.vision_layer, crops).received()
        attention, real = crops.spread(seen), crops.spread(torch.ones_like(seen)) > 0
        budgets = tuple(self.kept(n, 1, ctx.layer) for own in ctx.images() for n in own)
        counts = [
            self._count(sum(crops.tokens[group] for group in own), k)
            for own, k in zip(crops.members, budgets, strict=True)
        ]
        runs = runs_of(crops, tuple(counts))
        weights = run_scores(runs.split(hidden), runs.split(attention), runs.split(real), self.diversity)
        shares = [by_weight(own, k) for own, k in zip(torch.split(weights, counts), budgets, strict=True)]
        return self._ranked(ctx, runs, attention.masked_fill(~real, -torch.inf), torch.cat(shares), weights)

    def _count(self, tokens: int, kept: int) -> int:
        """How many runs an image of so many tokens is cut into, of which so many stay."""
        wanted = max(1, int(RUNS * tokens / kept)) if self.runs is None else self.runs
        return min(wanted, tokens)

    def _ranked(
        self, ctx: TokenContext, runs: Groups, attention: Tensor, grants: Tensor, weights: Tensor
    ) -> Ranking:
        """By the attention ``[B, N]``, -inf at tokens of no crop."""

        def behind(last: Tensor) -> Ranking:
            return self._ranked(ctx, runs, attention.masked_fill(last, -torch.inf), grants, weights)

        by = apportioned(runs, runs.split(attention), grants, weights)
        by = by.masked_fill(attention == -torch.inf, -torch.inf)  # newlines within a run come last of all
        return replace(ranked(ctx, self, by, self.positions), again=behind)


def run_scores(rows: Tensor, attention: Tensor, real: Tensor, diversity: float) -> Tensor:
    """Score ``[R]`` float64 of every run of ``rows [R, L, D]``, ``attention [R, L]``, of the tokens that are ``real [R, L]``."""
    count = real.sum(1, keepdim=True).clamp(min=1)
    others = (count - 1).clamp(min=1)
    rows = rows.float().masked_fill(~real[..., None], 0.0)
    rows = rows / (rows.norm(dim=2, keepdim=True) + SMALL)
    alike = rows @ rows.mT
    alike.diagonal(dim1=1, dim2=2).zero_()
    apart = alike - (alike.sum(2) / others)[..., None]
    spread = apart.square().masked_fill(~real[:, None], 0.0).sum(2) / others
    # in float64 and then rounded, so that runs of the same values tie whatever their order
    attention, spread = (x.double().masked_fill(~real, 0.0).sum(1) / count[:, 0] for x in (attention, spread))
    paid = SCALE * attention
    whole, power = torch.frexp(paid + diversity * spread * (paid / (spread + SMALL)))
    return torch.ldexp((whole * DIGITS).round() / DIGITS, power)


@lru_cache(64)
def runs_of(crops: Groups, counts: Counts) -> Groups:
    """Each image's tokens of its crops, in raster order, cut into ``counts[i]`` runs; the first ones may have one more.

    A run reaches from its first token to its last, over newlines between.
    """
    found, samples, images = [], [], []
    for image, (own, count) in enumerate(zip(crops.members, counts, strict=True)):
        places = sorted(place for group in own for place in places_of(crops.crops[group]))
        each, more = divmod(len(places), max(count, 1))
        for run in range(count):
            first = run * each + min(run, more)
            span = places[first + each - (run >= more)] - places[first] + 1
            found.append(Crop(places[first], span, 1, span))
        samples += [crops.owners[image]] * count
        images += [image] * count
    none = ((),) * len(counts)
    return replace(crops, crops=tuple(found), samples=tuple(samples), images=tuple(images), rest=none)
