"""DyCoke, its temporal merging: of every four frames the first stays, and of the others what differs from an earlier one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.constants import filled, whole_numbers
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import budgets_of, ranked
from vlmprune.policies.checks import check_keep
from vlmprune.policies.groups import Counts
from vlmprune.policies.parts.apportion import apportioned
from vlmprune.policies.parts.frames import Frames, anchors_first, cosine_at, frames_of, spread_evenly

BACK = (0, 1, 2, 1)
"""How many frames before it the one stands with which each frame of a group is compared; 0 = it is the group's first."""


@dataclass(frozen=True)
class DyCoke(PruningPolicy):
    """Keeps the first of every four frames; of the second and the fourth what is least like the frame before, of the third
    what is least like the first.

    That is the first of the method's two stages, the temporal merging (TTM); in spite of its name tokens are dropped, not merged.
    The second one changes with every new token which entries of the cache are attended to, which a choice made once for a
    prompt cannot: it is not done here.

    The paper's K is the share that goes of a frame which is no first one; here the budget is the video's, as elsewhere, and
    shared out evenly over those frames: of 4 m frames ``keep`` is ``1 - 3 K / 4``. K of 0.5, 0.7 and 0.9 are 0.625, 0.475 and
    0.325. With less than the first frames have, only these keep some, spread evenly; so does a single image.

    The released code leaves the third frame of the last group whole, drops the last frame of an odd number, and orders a frame's
    tokens by their likeness; here every group is treated alike and tokens stay in their order. LLaVA-OneVision's newline token,
    which the release keeps, goes first. A frame of another shape than the one it would be compared with counts as a first one.

    Args:
        keep: share of a video's tokens (float) or tokens per video (int).
        positions: ``"keep"`` their own, or ``"pack"`` (released code: what stays stands at 0, 1, 2, ...).
    """

    summary = "the first of every four frames, and what differs from it or from the frame before"
    paper = "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models (CVPR 2025), arXiv 2411.15024"
    formula = (
        "frames 0, 4, 8, … stay;  the others share what is left of k evenly\n"
        "s_j = -cos(x_i, x_j),  i in the same place: of frame r - 1 in frames r = 1, 3, 5, …\n"
        "of frame r - 2 in frames r = 2, 6, 10, …\n"
        "in every frame keep as many of the highest s_j"
    )
    checked = "reading"
    for_video = True
    growth = "n"

    keep: int | float = 0.475
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    layers = (0,)  # before the language model
    spend = "image"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        frames, device = frames_of(ctx), ctx.device
        hidden = ctx.given("hidden")
        earlier = compared_with(frames)
        anchors = tuple(g for g, other in enumerate(earlier) if other < 0)
        kept = anchors_first(frames, anchors, budgets_of(ctx, self))
        at, even = (
            frames.same_place(earlier, device),
            frames.groups.spread(spread_evenly(frames, kept, device)),
        )
        scores = torch.where(at < 0, even, -cosine_at(hidden, at))
        level = filled((len(kept),), 0.0, torch.float32, device)  # nothing is left over
        by = apportioned(frames.groups, frames.groups.split(scores), whole_numbers(kept, device), level)
        return ranked(ctx, self, by, self.positions)


def compared_with(frames: Frames) -> Counts:
    """Of each frame of the batch, the one with which it is compared; -1 = none, it is a first one."""
    earlier = {steps: frames.before(steps) for steps in BACK if steps}
    places = (t % len(BACK) for own in frames.groups.members for t in range(len(own)))
    return tuple(earlier[BACK[t]][g] if t else -1 for g, t in enumerate(places))
