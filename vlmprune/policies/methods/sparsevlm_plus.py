"""SparseVLM+: SparseVLM without merging, its attention freed from RoPE's decay and read from the priority heads only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import AttentionInputs, Needs, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import check_whole
from vlmprune.policies.parts.by_schedule import BySchedule
from vlmprune.policies.parts.raters import rated, rater_weights

LEAST, INSTEAD = 1e-3, 0.05
"""Shares of the kernel's value at distance 0: at or below the first it is taken to be the second."""


@dataclass(frozen=True)
class SparseVLMPlus(BySchedule):
    """Keeps what the raters attend to in the priority heads, after division by the attention that RoPE alone would pay.

    Raters as in SparseVLM. Their attention ``A`` (softmax over the whole row) becomes ``A / R``, where R is the scaled
    dot product of an all-ones query and key at the two positions, taken from the model's own rotary tables. The
    ``heads`` with the largest total from raters to visual tokens are averaged. Nothing is merged, positions stay.
    A sample without text after its image keeps tokens spread evenly, one whose attention is all NaN its first ones.

    Deviation (reading): with distance R falls, with ripples, until it is no longer positive: for base 10000 first at distance
    725 with head dim 64, at 1707 with 128. From there on the released code flips signs or divides by almost nothing. Here R
    is 0.05 of its value at distance 0 wherever it is at most 0.001 of it, so the correction is 20 times that of distance 0.
    Before those distances nothing differs (LLaVA-1.5 with up to 1100 text tokens).

    Args:
        tokens: budget 192, 128, 96 or 64, which names the released schedule for an image of 576; counts are per image.
        heads: how many priority heads; a model with fewer uses them all.
        layers: the stages: one more than the layers whose output is thinned.
        keep: an explicit schedule in place of the budget's, per layer tokens per image or shares; () = none.
    """

    summary = "SparseVLM freed from RoPE's decay, by priority heads, positions kept"
    paper = "SparseVLM+, the released version 2.0 of SparseVLM, arXiv 2410.04417"
    formula = (
        "r_t = mean_j softmax_t(e_j · e_t) over all j of the prompt;  R = {t: r_t > mean_t r_t} or all t\n"
        "c_tj = rope_t(1) · rope_j(1) / √head_dim: two vectors of ones, turned to the positions of t and j\n"
        "p[h, j] = mean_{t ∈ R} A[K-1][h, t, j] / c_tj;  0.05 c_tt in place of c_tj ≤ 0.001 c_tt\n"
        "s_j = mean_{h ∈ H} p[h, j],  H = the 14 heads of highest ∑_j p[h, j]  (heads=14)\n"
        "keep the k(tokens) highest s_j, by its schedule, at most n - 1"
    )
    # for 640 and shares no schedule is released: one share, for the mean over all layers
    presets = {n: f"tokens={n}" for n in (192, 128, 64)} | each(
        "keep={0}/{0}/{0}", of={640: 0.4027, 0.333: 0.5256, 0.222: 0.364}
    )
    schedules = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
    growth = "n"

    tokens: int = 192
    heads: int = 14
    layers: tuple[int, ...] = (3, 7, 16)
    keep: tuple[int | float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("heads", self.heads, 1)

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous", rows="text", embeds=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = ctx.given("attention")
        rating = seen.rating(
            row_weight=rater_weights(ctx), pair_weight=1 / rope_kernel(seen), top_heads=self.heads
        )
        return ranked(ctx, self, rated(rating, ctx))


def rope_kernel(seen: AttentionInputs) -> Tensor:
    """``R [B, rows, columns]`` float32: ``<rope(1, i), rope(1, j)> / sqrt(D)``, INSTEAD of the same at ``i = j`` up to LEAST."""
    cos, sin = (t.expand(len(seen.rows), -1, -1).float() for t in seen.rope)
    half = cos.shape[-1] // 2
    ones = cos + torch.cat([-sin[..., :half], sin[..., half:]], -1)  # rotate-half of a vector of ones
    past = seen.key.shape[2] - ones.shape[1]
    rows, columns = (
        ops.gather_tokens([ones], torch.where(at >= 0, at - past, -1))[0] for at in (seen.rows, seen.columns)
    )
    scale = ones.shape[-1] ** -0.5
    most = ones.square().sum(-1).amax(1)[:, None, None] * scale
    found = rows @ columns.transpose(1, 2) * scale
    return torch.where(found > LEAST * most, found, INSTEAD * most)
