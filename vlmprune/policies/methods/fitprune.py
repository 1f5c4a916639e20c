"""FitPrune: a few tokens a layer go, those to which neither the text nor the other visual tokens pay attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.checks import BEFORE, check_layers, share_of
from vlmprune.policies.choose import quotas
from vlmprune.policies.parts.attention_maps import text_times_image
from vlmprune.policies.parts.fitted import SCHEDULES, left_of, stages_of
from vlmprune.policies.parts.stage_settings import at_stage, check_drop, check_each_stage, left_after


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
        own = stages_of(self.reduction)
        released = self.drop is None and self.layers in map(stages_of, SCHEDULES)
        if self.layers == () or released:  # of a copy: another's
            object.__setattr__(self, "layers", own)
        check_layers(self.layers, 1, BEFORE)
        if self.drop is None:
            right = self.layers == own
            check(right, "layers", "() for a released schedule, or `drop` too", repr(self.layers))
        else:
            check_each_stage("drop", self.drop, self.layers, check_drop)

    def needs(self, layer: int) -> Needs:
        """Every row, and where the text is: its rows are told from the image's."""
        return Needs(attention="previous", rows="all", text=True)

    def at(self, share: float) -> Self:
        return replace(self, drop=1 - share_of(share))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        if self.drop is None:
            return left_of(tokens, self.reduction, layer)
        return left_after(at_stage(self.drop, self.layers, layer), tokens, images)

    def rank(self, ctx: TokenContext) -> Ranking:
        return Ranking(text_times_image(ctx.given("attention")), tuple(quotas(ctx, self)))
