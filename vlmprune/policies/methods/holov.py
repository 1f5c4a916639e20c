"""HoloV: quotas over runs of an image's raster, so that what stays comes from all of it; in a run the best by CLS attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import budgets_of, vision_of
from vlmprune.policies.checks import check_keep, check_number, check_whole
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.apportion import ranked_by_grants
from vlmprune.policies.parts.raster_runs import run_scores, runs_of
from vlmprune.policies.parts.tiles import by_weight

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
        budgets = budgets_of(ctx, self)
        sizes = (sum(crops.tokens[group] for group in own) for own in crops.members)
        counts = [self._count(n, k) for n, k in zip(sizes, budgets, strict=True)]
        runs = runs_of(crops, tuple(counts))
        weights = run_scores(runs.split(hidden), runs.split(attention), runs.split(real), self.diversity)
        shares = [by_weight(own, k) for own, k in zip(torch.split(weights, counts), budgets, strict=True)]
        attention = attention.masked_fill(~real, -torch.inf)  # newlines within a run come last of all
        return ranked_by_grants(ctx, self, runs, attention, torch.cat(shares), weights, self.positions)

    def _count(self, tokens: int, kept: int) -> int:
        """How many runs an image of so many tokens is cut into, of which so many stay."""
        wanted = max(1, int(RUNS * tokens / kept)) if self.runs is None else self.runs
        return min(wanted, tokens)
