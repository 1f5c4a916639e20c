"""ACCM's choice of tokens: some by the question, the outliers of CLS attention, and evenly spaced ones up to a fixed number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import counting, remembered
from vlmprune.errors import check
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import quota_of, ranked, vision_of
from vlmprune.policies.checks import check_flag, check_keep, check_seed, check_share, check_whole, check_word
from vlmprune.policies.choose import marks
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Groups, Kind, Quota
from vlmprune.policies.parts.outlying import joined_attention, outliers
from vlmprune.policies.parts.relevance import Relevance, check_relevance, relevance_of

TEXT = {288: 150, 144: 70, 72: 40, 36: 20, 18: 12}
"""The authors' budgets, and how many tokens of each the question chooses."""


@dataclass(frozen=True)
class ACCMSelection(PruningPolicy):
    """Keeps ``keep`` tokens of every image: those the question chooses, CLS's outliers, and others spread over the image.

    The question chooses ``text`` tokens; to them come those whose CLS attention exceeds ``Q3 + 1.5 (Q3 - Q1)`` of the image.
    If that is too few, every ``ceil(N / missing)``-th of the N tokens follows that is not yet there, then leftovers in an
    order that ``seed`` draws, the same for all images. If it is too many, ``overflow`` decides.

    This is the choice that comes before ACCM's captions. Compared with the released code on the same tensors (680 images of
    576 patches, all five budgets, random and made to overflow or to have no outlier), it keeps the same tokens in the same
    order, but for which are left over and where numbers are equal, with

        ACCMSelection(keep=36, relevance=f, nearest=False, vision_layer=-1, heads="joined", overflow="last",
                      order="selected")

    where f gives the cosine of CLIP's embedding of every patch with that of the question's first line. There the question
    chooses the FARTHEST patches, an overflow keeps the bottom of the image, tokens reach the language model as they were
    found, and leftovers are drawn anew each time; none of that is explained, so none is a default. LLaVA checkpoints carry
    neither CLIP's text tower nor its visual projection: ``"text"`` is a reading, that of CDPruner. Not in the release: where
    all tokens of an image are equally relevant (no text follows it), and where relevance is NaN or infinite, the question
    chooses none; without a CLS token the mean attention that a patch receives from all patches stands in. Left out are its
    quotas for several questions about one image (a prompt is one) and a rounding that can lose an outlier where N is not 576.

    Args:
        keep: tokens per image (int; published budgets 288, 144, 72, 36, 18) or share of its tokens (float).
        text: how many of them the question chooses, a number (int) or a share of them (float). None: 150, 70, 40, 20, 12 for
            the published budgets, else 5/9, as for 72 and 36.
        relevance: ``"text"``, the mean cosine between a projected visual token and the input embeddings of the text after
            the last image; ``"none"``, the question chooses nothing; or a function of the TokenContext (which then has
            ``hidden`` and ``embeds``) that returns ``[B, N]``, higher = more relevant.
        nearest: whether the most relevant tokens are chosen, or the least (released code).
        vision_layer: vision-tower layer whose attention is read; -2 is the one whose output LLaVA projects, -1 the released
            code's.
        heads: ``"split"``, the mean over heads, or ``"joined"`` (released code): one softmax of the whole query and key.
        overflow: ``"score"``: the question's tokens stay, then the outliers by falling attention; or ``"last"`` (released
            code): the last ones in raster order.
        order: ``"raster"``, or ``"selected"`` (released code): question and outliers, evenly spaced, leftovers; each in
            raster order but the last.
        seed: which order leftovers have.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: the kept tokens stand at 0, 1, 2, ...).

    Raises:
        InputError: a setting is out of range; in ``rank`` and ``select``, the function returns another shape.
    """

    summary = "some by the question, outliers of CLS attention, the rest evenly spaced"
    paper = "the selection of ACCM, Adaptive Content Compensation Method (ACM MM 2025), arXiv 2508.01236"
    formula = (
        "s_j = mean_h V[vision_layer][h, CLS, j];  r_j = mean_t cos(x_j, e_t)  (relevance='text')\n"
        "C = q highest r_j ∪ {s_j > b + 1.5 (b - a)}, a = 1st, b = 3rd quartile of s  (nearest=True)\n"
        "q = 150, 70, 12 where k is 288, 144, 18, else round(5 / 9 k)  (text=None)\n"
        "|C| > k: keep the q, then of C the highest s_j  (overflow='score')\n"
        "|C| < k: keep C, then those of 0, d, 2 d, … that are not in C, d = ⌈n / (k - |C|)⌉,\n"
        "then others in an order that seed draws, until k of every crop are kept"
    )
    presets = each("keep={}", counts=",positions=pack")
    checked = "reading"
    growth = "n"  # of a tower with CLS; without, every patch looks at every other: n^2

    keep: int | float = 36
    text: int | float | None = None
    relevance: Relevance = "text"
    nearest: bool = True
    vision_layer: int = -2
    heads: Literal["split", "joined"] = "split"
    overflow: Literal["score", "last"] = "score"
    order: Literal["raster", "selected"] = "raster"
    seed: int = 0
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.text, float):
            check_share("text", self.text)
        elif self.text is not None:
            check_whole("text", self.text, 0)
            fits = isinstance(self.keep, float) or self.text <= self.keep
            check(fits, "text", f"at most keep, which is {self.keep}", self.text)
        check_relevance(self.relevance)
        check_flag("nearest", self.nearest)
        check_whole("vision_layer", self.vision_layer)
        check_word("heads", self.heads, "split", "joined")
        check_word("overflow", self.overflow, "score", "last")
        check_word("order", self.order, "raster", "selected")
        check_seed(self.seed)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        """Query and key of the vision layer; the projected features and the text's embeddings where the question chooses."""
        asked = self.relevance != "none"
        return Needs(hidden=asked, embeds=asked, vision=(self.vision_layer,))

    def ranks(self, layer: int) -> bool:
        """In raster order."""
        return super().ranks(layer) and self.order == "raster"

    def rank(self, ctx: TokenContext) -> Ranking:
        """The same tokens in any order."""
        crops = crops_of(ctx)
        if not crops.tokens:
            return Ranking(ctx.mask.float(), ctx.counts)
        quota = quota_of(ctx, self, crops)
        turns = crops.together([(kind, turn) for kind, turn, _ in self._turns(ctx, crops, quota)])
        last = 3 * max(crops.tokens)
        return ranked(ctx, self, crops.spread(-turns.float(), fill=-last), self.positions)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        if self.order == "raster":
            return super().select(ctx)
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        quota, found = quota_of(ctx, self, crops), []
        for kind, turn, place in self._turns(ctx, crops, quota):
            index, _ = ops.select_topk(-turn.float(), kind.kept)
            found.append((kind, index.gather(1, place.gather(1, index).argsort(dim=1))))
        return Reduction(crops.index(crops.together(found), quota), None, self.positions)

    def _turns(self, ctx: TokenContext, crops: Groups, quota: Quota) -> Iterator[tuple[Kind, Tensor, Tensor]]:
        """When each token's turn to be kept is, and its place among those found: ``[i, N]`` int64, the lower the sooner."""
        seen = vision_of(ctx, self.vision_layer, crops)
        attention = seen.received() if self.heads == "split" else joined_attention(seen)
        relevance = relevance_of(ctx, self.relevance)
        relevance = None if relevance is None else crops.split(relevance if self.nearest else -relevance)
        for kind in crops.kinds(quota):
            paid = crops.take(attention, kind)
            N, (outlier, rank) = paid.shape[1], outliers(paid)
            asked = torch.zeros_like(outlier)
            if relevance is not None:
                asked = self._asked(crops.take(relevance, kind), kind.kept)
            chosen, at = asked | outlier, counting(1, N, paid.device)
            place = places(chosen, kind.kept, at, shuffled(self.seed, N, paid.device))
            first = N - 1 - at if self.overflow == "last" else rank.masked_fill(asked, -1)
            yield kind, torch.where(chosen, first, place), place

    def _asked(self, score: Tensor, kept: int) -> Tensor:
        """Which tokens of crops the question chooses, ``[i, N]`` bool: at most its quota, none where nothing sets them apart."""
        sound = score.isfinite()
        score = score.masked_fill(~sound, float("-inf"))
        apart = score.amax(1) > score.masked_fill(~sound, float("inf")).amin(1)
        best, _ = ops.select_topk(score, self.quota(kept))
        return marks(best, score.shape[1]) & sound & apart[:, None]

    def quota(self, kept: int) -> int:
        """How many of ``kept`` tokens of an image the question chooses."""
        if self.text is None:
            return TEXT.get(kept, round(kept * 5 / 9))
        return int(self.text * kept + 1e-6) if isinstance(self.text, float) else min(kept, self.text)


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
