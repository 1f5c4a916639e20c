"""FitPrune: a few tokens a layer go, those to which neither the text nor the other visual tokens pay attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import AttentionInputs, Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.checks import BEFORE, check_layers, share_of
from vlmprune.policies.choose import marks, quotas
from vlmprune.policies.counts import keep_count
from vlmprune.policies.parts.attention_maps import attention_maps

IMAGE = 576
SCHEDULES: Mapping[int, tuple[int, ...]] = {
    10: (0, 0, 1, 2, 1, 0, 1, 4, 5, 5, 11, 4, 2, 2, 0, 0, 1, 1, 2, 4, 2, 10, 1, 1, 1, 2, 1, 1, 0, 1),
    20: (0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0, 6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1),
    30: (0, 0, 7, 6, 4, 5, 16, 40, 24, 21, 24, 4, 2, 3, 4, 0, 16, 0, 11, 26, 6, 32, 3, 1, 0, 1, 2, 2, 4),
    40: (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1, 26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2),
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2),
    55: (6, 17, 69, 31, 34, 19, 59, 30, 23, 6, 8, 7, 2, 5, 8, 2, 29, 4, 12, 25, 4, 19, 2, 1, 0, 0, 1, 0, 1),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1),
}
"""Per cut of the FLOPs in percent, how many tokens of an image of 576 go within each of LLaVA-1.5-7B's layers, as released."""


@dataclass(frozen=True)
class FitPrune(PruningPolicy):
    """Drops at every stage the tokens of lowest ``text x self``, both of the layer before the stage.

    Of the attention, softmax over the whole row, first the highest of all heads is taken for every pair of tokens. ``text``
    is the sum of it over the rows of the text behind the last image, ``self`` that over the rows of the visual tokens.

    How many go is fitted offline: on some prompts, from the first layer on, what both attentions can lose alike, the loss
    being bisected until a budget of FLOPs is met. That search is not part of this; the released schedules of LLaVA-1.5-7B
    are, by their cut of the FLOPs. They are of images of 576 tokens and exact for these; an image of another size loses the
    same shares at each stage.

    As released, where tokens leave between attention and MLP of a layer: here they enter the next one no more, which
    changes nothing for those that stay. The first 35 positions, which it takes for the text in front of the image, are what
    is in front of the image here. A sample without text behind its image goes by ``self`` alone.

    The maximum over heads comes before the sums, so attention is made pair by pair, some rows at a time (64 MiB).

    Args:
        reduction: which released schedule: 10, 20, 30, 40, 50, 55, 60, 70, 80 or 90 percent of the FLOPs.
        layers: the stages, ascending; () = those of the schedule, each the layer behind one in which tokens go.
        drop: how many go, in place of the schedule: a number per image (int) or a share of those entering (float, below 1), the
            same at every stage or a tuple of one for each; None = the schedule's.
    """

    summary = "a few tokens a layer go, those that neither text nor image attends to, by a fitted schedule"
    paper = (
        "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models "
        "(AAAI 2025), arXiv 2409.10197"
    )
    formula = (
        "a_ij = max_h A[K-1][h, i, j]\n"
        "s_j = ∑_t a_tj · ∑_i a_ij, over visual i\n"
        "at every stage K keep the highest s_j; the schedule's drop go"
    )
    # ours: no schedule is released for a mean of these
    presets = {
        192: "layers=1/2/3/4,drop=0.268",
        128: "layers=1/2/3/4,drop=0.3557",
        64: "layers=1/2/3/4,drop=0.502",
        640: "layers=1/2/3/4,drop=0.3566",
        320: "layers=1/2/3/4,drop=0.504",
        160: "layers=1/2/3/4,drop=0.6737",
        0.333: "layers=1/2/3/4,drop=0.2735",
        0.222: "layers=1/2/3/4,drop=0.3643",
        0.111: "layers=1/2/3/4,drop=0.519",
    }
    growth = "n^2"

    reduction: int = 60
    layers: tuple[int, ...] = ()
    drop: int | float | tuple[int | float, ...] | None = None

    def __post_init__(self) -> None:
        named = f"one of {', '.join(map(str, SCHEDULES))}"
        known = isinstance(self.reduction, int) and self.reduction in SCHEDULES
        check(known, "reduction", named, repr(self.reduction))
        schedule = SCHEDULES[self.reduction]
        own = tuple(layer for layer, gone in enumerate(schedule, 1) if gone)
        of_schedules = [tuple(k for k, gone in enumerate(some, 1) if gone) for some in SCHEDULES.values()]
        if self.layers == () or (self.drop is None and self.layers in of_schedules):  # of a copy: another's
            object.__setattr__(self, "layers", own)
        check_layers(self.layers, 1, BEFORE)
        if self.drop is None:
            right = self.layers == own
            check(right, "layers", "() for a released schedule, or `drop` too", repr(self.layers))
            return
        each = self.drop if isinstance(self.drop, tuple) else (self.drop,)
        for some in each:
            share = isinstance(some, float) and 0 <= some < 1
            whole = isinstance(some, int) and not isinstance(some, bool) and some >= 0
            check(share or whole, "drop", "a share in [0, 1) or a whole number >= 0", repr(some))
        fits = not isinstance(self.drop, tuple) or len(each) == len(self.layers)
        check(fits, "drop", f"{len(self.layers)} entries, one per layer", repr(self.drop))

    def needs(self, layer: int) -> Needs:
        """Every row, and where the text is: its rows are told from the image's."""
        return Needs(attention="previous", rows="all", text=True)

    def at(self, share: float) -> Self:
        return replace(self, drop=1 - share_of(share))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        stage, drop = self.layers.index(layer), self.drop
        if drop is None:
            left = [IMAGE - gone for gone in accumulate(SCHEDULES[self.reduction])]
            before = left[layer - 2] if layer > 1 else IMAGE
            return min(tokens, max(1, round(tokens * left[layer - 1] / before)))
        here = drop[stage] if isinstance(drop, tuple) else drop
        if isinstance(here, float):
            return keep_count(1 - here, tokens)
        return min(tokens, max(1, round(tokens - here * images)))

    def rank(self, ctx: TokenContext) -> Ranking:
        return Ranking(attended(ctx.given("attention")), tuple(quotas(ctx, self)))


def attended(seen: AttentionInputs) -> Tensor:
    """``[B, N]`` float32: what text and visual tokens pay to each visual token, multiplied."""
    rows, columns = seen.rows, seen.columns
    if not columns.shape[1]:
        return columns.float()
    real = rows >= 0
    text = real & (rows > columns.amax(1, keepdim=True))
    visual = real & marks(columns, seen.key.shape[2]).gather(1, rows.clamp(min=0))
    kinds = torch.stack([text, visual], 1).float()
    paid = torch.zeros(len(rows), 2, columns.shape[1], device=rows.device)
    for some, joined in attention_maps(seen, rows, "max"):
        paid += kinds[..., some] @ joined
    by_text, by_image = paid.unbind(1)
    return torch.where(text.any(1, keepdim=True), by_text, 1.0) * by_image
