"""EVS: of a video keep the first frame, and the tokens that changed most since the frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import budgets_of, ranked
from vlmprune.policies.checks import check_keep
from vlmprune.policies.parts.frames import anchors_first, cosine_at, frames_of, spread_evenly

FIRST = 2.0
"""What a first frame's scores have on top: no dissimilarity is above 2, and theirs are not below 0."""


@dataclass(frozen=True)
class EVS(PruningPolicy):
    """Keeps the tokens least like the one in the same place of the frame before, counted over the whole video.

    Tokens are compared as the language model gets them, by cosine, as in the release (vLLM,
    ``multimodal/video_prune/evs.py``); the paper
    compares pixels. The first frame comes before all others. With a budget of less than a frame, which the release raises to a
    whole one, what stays is spread evenly over it; so are the tokens that stay of a single image, of which nothing is known
    here (the release leaves images alone). A frame of another shape than the one before (the small view and the tiles of an
    image that is cut up) is another first one; newline tokens go first.

    Args:
        keep: share of a video's tokens (float; the release's 1 - ``video_pruning_rate``) or tokens per video (int), the first
            frame among them.
        positions: ``"keep"`` their own, or ``"pack"``: what stays stands at 0, 1, 2, ...
    """

    summary = "a video's first frame, and what changed most since the frame before"
    paper = "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, arXiv 2510.14624"
    formula = (
        "s_j = 1 - cos(x_i, x_j),  i in the same place of the frame before\n"
        "in the first frame above all others, of them the evenly spread ones first\n"
        "in every video keep the k highest s_j"
    )
    for_video = True
    growth = "n"

    keep: int | float = 0.25
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    layers = (0,)  # before the language model
    spend = "image"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        frames = frames_of(ctx)
        hidden = ctx.given("hidden")
        before = frames.before()
        firsts = tuple(g for g, other in enumerate(before) if other < 0)
        even = spread_evenly(frames, anchors_first(frames, firsts, budgets_of(ctx, self)), ctx.device)
        at = frames.same_place(before, ctx.device)
        scores = torch.where(at >= 0, 1 - cosine_at(hidden, at), frames.groups.spread(FIRST + even, fill=-1))
        return ranked(ctx, self, scores, self.positions)
