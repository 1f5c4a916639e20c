"""VidCom2: frames unlike the rest of the video keep more tokens, and of each the tokens unlike its and the video's centre."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.constants import whole_numbers
from vlmprune.errors import check
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import check_keep, check_number, is_number
from vlmprune.policies.choose import falling_places
from vlmprune.policies.parts.frames import budgets_of, frames_of

BEHIND = 16.0
"""How many times lower the scores are of what a frame has no share for."""

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""The variances of the Gaussians."""


@dataclass(frozen=True)
class VidCom2(PruningPolicy):
    """Shares a video's budget out by how unlike the video each frame is, and keeps the least typical tokens of every frame.

    A token is typical by the sum of five Gaussians of its distance to the mean token of the video, and to that of its frame, all
    of length 1 and in the ``channels`` that vary least. A frame's share of the budget is in proportion to ``1 + p - mean p``, p
    the softmax over frames of their mean token's being untypical of the video; no frame gets more than it has.

    The authors' code rounds every frame's number by itself, so that the total differs with the video. Here it is exact, as in vLLM
    (``multimodal/video_prune/vidcom2.py``): of the whole video what is too much goes, and what is missing comes, by the same
    scores. The authors' also keeps the newline tokens of LLaVA-Video's rows; here they go first. Sums are float32, theirs in
    the model's precision. A single image is a video of one frame; every tile and the small view of one that is cut up is a frame,
    and shares weigh by size.

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
        frames, device = frames_of(ctx), ctx.device
        if not frames.most:
            return Ranking(ctx.mask.float(), ctx.counts)
        hidden = frames.split(ctx.given("hidden"))
        real = frames.real(device)
        rows = _unit_rows(hidden, real, self.channels)
        of_video = _typical(rows, _mean(rows, real, (1, 2)))
        of_frame = _typical(rows, _mean(rows, real, (2,)))
        sizes = real.sum(2)
        unlike = -(of_video.masked_fill(~real, 0.0).sum(2) / sizes.clamp(min=1))
        weight = (unlike / self.temperature).masked_fill(sizes == 0, float("-inf")).softmax(1)
        level = (weight * sizes).sum(1, keepdim=True) / sizes.sum(1, keepdim=True).clamp(min=1)
        quota = ((self._base(ctx) * (1 + weight - level)).clamp(max=1) * sizes).round().clamp(min=1)
        scores = -(of_video + of_frame)
        granted = falling_places(scores, real) < quota[..., None]
        # times a power of two it is as exact, and below all scores, which are from -10 to -1
        scores = torch.where(granted, scores, BEHIND * scores)
        return ranked(ctx, self, frames.spread(scores, fill=float("-inf")), self.positions)

    def _base(self, ctx: TokenContext) -> Tensor | float:
        """What share of each of the I images stays, ``[I, 1]``, or of all of them."""
        if isinstance(self.keep, float):
            return self.keep
        sizes = tuple(n for own in ctx.images() for n in own)
        k, n = (whole_numbers(x, ctx.device)[:, None] for x in (budgets_of(ctx, self), sizes))
        return k / n.clamp(min=1)


def _mean(rows: Tensor, real: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean of ``rows [I, F, P, D]`` over these dims (kept), where they are ``real``; padding is zeros."""
    count = real.sum(dims, keepdim=True).clamp(min=1)
    return rows.sum(dims, keepdim=True) / count[..., None]


def _unit_rows(hidden: Tensor, real: Tensor, share: float) -> Tensor:
    """``[I, F, P, C]`` float32: the channels of least variance over each video's tokens, of length 1; zeros at padding."""
    x, count = hidden.float(), max(1, int(hidden.shape[-1] * share))
    apart = (x - _mean(x, real, (1, 2))).masked_fill(~real[..., None], 0.0)
    quiet = apart.square().sum((1, 2)).argsort(dim=1, stable=True)[:, :count]
    chosen = x.gather(3, quiet[:, None, None].expand(*x.shape[:3], -1))
    return normalize(chosen, dim=-1)


def _typical(rows: Tensor, centre: Tensor) -> Tensor:
    """``[I, F, P]`` the sum of the Gaussians of each row's distance to the centre."""
    far = (rows - centre).square().sum(-1)
    return torch.stack([torch.exp(far / (-2 * width)) for width in WIDTHS]).sum(0)
