"""VidCom2: frames unlike the rest of the video keep more tokens, and of each the tokens unlike its and the video's centre."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.constants import whole_numbers
from vlmprune.errors import check
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import budgets_of, ranked
from vlmprune.policies.checks import check_keep, check_number, is_number
from vlmprune.policies.choose import falling_places
from vlmprune.policies.parts.frames import Videos, frames_of
from vlmprune.policies.parts.typical import quiet_directions, typical

BEHIND = 16.0
"""How many times lower the scores are of what a frame has no share for."""


@dataclass(frozen=True)
class VidCom2(PruningPolicy):
    """Shares a video's budget out by how unlike the video each frame is, and keeps the least typical tokens of every frame.

    A token is typical by the sum of five Gaussians of its distance to the mean token of the video, and to that of its frame,
    all of length 1 and in the ``channels`` that vary least. A frame's share of the budget is in proportion to ``1 + p - mean
    p``, p the softmax over frames of their mean token's being untypical of the video; no frame gets more than it has.

    The authors' code rounds every frame's number by itself, so that the total differs with the video. Here it is exact, as in
    vLLM (``multimodal/video_prune/vidcom2.py``): of the whole video what is too much goes, and what is missing comes, by the
    same scores. The authors' also keeps the newline tokens of LLaVA-Video's rows; here they go first. Sums are float32, theirs
    in the model's precision. A single image is a video of one frame; every tile and the small view of one that is cut up is a
    frame, and shares weigh by size.

    Args:
        keep: share of a video's tokens (float; the paper's 0.25 and 0.15) or tokens per video (int).
        channels: share of the hidden channels that are compared, those of least variance over the video's tokens, in (0, 1].
        temperature: of the softmax over frames, above 0: the smaller, the more a frame of its own gets.
        positions: ``"keep"`` their own, or ``"pack"`` (released code for LLaVA: what stays stands at 0, 1, 2, ...).
    """

    summary = "frames unlike the video keep more, of each the tokens unlike its centre and the video's"
    paper = (
        "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models (EMNLP 2025), "
        "arXiv 2505.14454"
    )
    formula = (
        "y_j = x_j / |x_j| in the half of the channels of least variance over the video  (channels=0.5)\n"
        "p_j = ∑_{r = -3 … 1} exp(-|y_j - mean y_i|² / 2^(r+1)), the mean over the video\n"
        "q_j = the same with the mean over its frame;  s_j = -(p_j + q_j)\n"
        "w = softmax of -(mean p_j) / temperature over the frames\n"
        "of each frame the (1 + w - mean w) k / F highest s_j come first,  F = frames;  keep k in all"
    )
    for_video = True
    growth = "n"

    keep: int | float = 0.25
    channels: float = 0.5
    temperature: float = 0.01
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        share = is_number(self.channels) and 0 < self.channels <= 1
        check(share, "channels", "a share in (0, 1]", repr(self.channels))
        check_number("temperature", self.temperature, above=0)

    layers = (0,)  # before the language model
    spend = "image"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        hidden = ctx.given("hidden")
        scores = hidden.new_full(ctx.mask.shape, float("-inf"), dtype=torch.float32)
        for videos in frames_of(ctx).alike:
            videos.put(scores, self._scores(ctx, videos, videos.split(hidden)))
        return ranked(ctx, self, scores, self.positions)

    def _scores(self, ctx: TokenContext, videos: Videos, hidden: Tensor) -> Tensor:
        """``[I, F, P]``, of each frame first what it has a share for."""
        real = videos.real(ctx.device)
        rows, sizes = quiet_directions(hidden, real, self.channels), real.sum(2)
        of_video = typical(rows, real, (1, 2))
        scores = -(of_video + typical(rows, real, (2,)))
        unlike = -(of_video.masked_fill(~real, 0.0).sum(2) / sizes)
        weight = (unlike / self.temperature).softmax(1)
        level = (weight * sizes).sum(1, keepdim=True) / sizes.sum(1, keepdim=True)
        quota = ((self._base(ctx, videos) * (1 + weight - level)).clamp(max=1) * sizes).round().clamp(min=1)
        granted = falling_places(scores, real) < quota[..., None]
        # times a power of two it is as exact, and below all scores, which are from -10 to -1
        return torch.where(granted, scores, BEHIND * scores)

    def _base(self, ctx: TokenContext, videos: Videos) -> Tensor | float:
        """What share of each of the I images stays, ``[I, 1]``, or of all of them."""
        if isinstance(self.keep, float):
            return self.keep
        sizes = tuple(n for own in ctx.images() for n in own)
        of_each = (tuple(x[i] for i in videos.images) for x in (budgets_of(ctx, self), sizes))
        k, n = (whole_numbers(x, ctx.device)[:, None] for x in of_each)
        return k / n
