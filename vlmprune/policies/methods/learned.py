"""Any trained scorer as a policy: the visual tokens that it scores highest stay."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.answer import check_scores
from vlmprune.policies.base import Growth, Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import check_keep, check_layer, share_of
from vlmprune.policies.choose import marks, quotas, select_counts
from vlmprune.policies.parts.held_scorer import Held, check_scorer
from vlmprune.policies.scorer import Scorer, fingerprint_of


@dataclass(frozen=True)
class Learned(PruningPolicy):
    """Keeps the visual tokens that a trained scorer scores highest.

    ``keep`` says how many stay, so nothing is read back to the host; or, with ``threshold``, the scores do, at one host read a
    prefill: those whose probability, the sigmoid of the score, lies above it, at most ``keep`` and at least one of a prompt.

    Args:
        scorer: a ``Scorer`` in evaluation mode, or the folder of a saved one, which is loaded when it is first needed. Where
            prompts are on another device it is copied there, once. It computes in the type of its weights, not the model's.
        layer: the stage: layers 0..layer-1 see every token. A scorer that was trained at a layer takes no other.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        threshold: a probability in (0, 1), with ``spend="prompt"``; None = as many as ``keep`` says stay.
        spend: "prompt": the best tokens of all images of a prompt stay; "image": every image keeps its own budget; "crop":
            which is shared out over its crops (tiles, small view, frames).
        weights: fingerprint of the scorer's weights as the policy is made; others make another policy. "" = whatever they are.

    Raises:
        InputError: a setting is out of range, or the weights are others than said; when it is first needed, a folder without a
            usable scorer or one of another layer; in ``select``, a module in training mode, or scores of another shape.
    """

    summary = "what a trained scorer scores highest"
    paper = "none: an interface for trained scorers; GlanceScorer after GlimpsePrune, arXiv 2508.01548"
    formula = "s = scorer(context), which is trained\nkeep the k highest s_j  (threshold=None)"
    checked = "reading"

    scorer: Scorer | str
    layer: int
    keep: int | float = 0.25
    threshold: float | None = None
    spend: Literal["prompt", "image", "crop"] = "prompt"
    weights: str = ""
    _held: Held = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given, level = self.scorer, self.threshold
        check_scorer(given)
        check_layer(self.layer)
        check_keep(self.keep)
        right = level is None or (isinstance(level, float) and 0 < level < 1)
        check(right, "threshold", "a probability in (0, 1) as a float, or None", repr(level))
        fits = level is None or self.spend == "prompt"
        check(fits, "spend", "'prompt' with a threshold, which counts no images", repr(self.spend))
        there = fingerprint_of(given)
        same = self.weights in ("", there)
        check(same, "weights", f"{there!r}, those of {given!r}, or ''", repr(self.weights))
        object.__setattr__(self, "weights", there)
        object.__setattr__(self, "_held", Held(given))

    @property
    def growth(self) -> Growth | None:
        return self._held.scorer.growth

    @property
    def fixed_count(self) -> bool:
        return self.threshold is None

    def needs(self, layer: int) -> Needs:
        scorer = self._held.scorer
        check(scorer.layer in (None, layer), "layer", f"{scorer.layer}, where {scorer!r} was trained", layer)
        return scorer.needs

    def at(self, share: float) -> Self:
        other = copy.copy(self)  # with the same scorer: a search for a share neither loads nor hashes it anew
        object.__setattr__(other, "keep", share_of(share))
        return other

    def kept(self, tokens: int, images: float, layer: int) -> int:
        known = self.threshold is None
        check(known, "threshold", "None where counts must be known beforehand", "one; see keep")
        return super().kept(tokens, images, layer)

    def rank(self, ctx: TokenContext) -> Ranking:
        scores = self.scores(ctx)
        if self.threshold is None:
            return ranked(ctx, self, scores)
        most = quotas(ctx, self.keep)
        best = marks(select_counts(scores, ctx, most), scores.shape[1])
        stay = best & (scores > math.log(self.threshold / (1 - self.threshold)))
        # coded 3, a token competes for the one place and stays in any case
        code = torch.where(stay, 3, 0).to(torch.int8)
        return Ranking(scores, tuple(min(1, n) for n in most), code=code, extra=tuple(most))

    @torch.no_grad()
    def scores(self, ctx: TokenContext) -> Tensor:
        """What the scorer says ``[B, N]`` float32."""
        return check_scores(self._held.on(ctx.device)(ctx), ctx, "scorer").float()
