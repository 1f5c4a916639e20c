"""SparseVLM+: SparseVLM without merging, its attention freed from RoPE's decay and read from the priority heads only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.policies.base import AttentionInputs, Needs, PruningPolicy, Ranking, TokenContext, attention_of
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import BEFORE, check_layers, check_schedule, check_whole
from vlmprune.policies.counts import thinned
from vlmprune.policies.raters import rated, rater_weights

SCHEDULES: Mapping[int, tuple[int, ...]] = {
    192: (300, 200, 118),
    128: (238, 108, 60),
    96: (246, 54, 28),
    64: (66, 34, 20),
}
FLOOR = 0.05
"""The kernel is taken to be at least this share of its value at distance 0."""


@dataclass(frozen=True)
class SparseVLMPlus(PruningPolicy):
    """Keeps what the raters attend to in the priority heads, after division by the attention that RoPE alone would pay.

    Raters as in SparseVLM. Their attention ``A`` (softmax over the whole row) becomes ``A / R``, where R is the scaled
    dot product of an all-ones query and key at the two positions, taken from the model's own rotary tables. The
    ``heads`` with the largest total from raters to visual tokens are averaged. Nothing is merged, positions stay.
    A sample without text after its image keeps tokens spread evenly, one whose attention is all NaN its first ones.

    Deviation (reading): for head dim 128 and base 10000, R falls with ripples from 11.3, is first below 0.57 at
    distance 1109 and negative from 1707 on, where the released code flips signs. Here R is at least 0.05 of its value
    at distance 0. Up to distance 1108 (LLaVA-1.5 with up to 500 text tokens) nothing differs; beyond it the correction
    stays positive and at most 20 times that of distance 0.

    Args:
        tokens: budget 192, 128, 96 or 64, which names the released schedule for an image of 576; counts are per image.
        heads: how many priority heads; a model with fewer uses them all.
        layers: the stages: one more than the layers whose output is thinned.
        keep: an explicit schedule in place of the budget's, per layer tokens per image or shares; () = none.
    """

    summary = "SparseVLM freed from RoPE's decay, by priority heads, positions kept"
    paper = "SparseVLM+, the released version 2.0 of SparseVLM, arXiv 2410.04417"
    presets = {192: "tokens=192", 128: "tokens=128", 64: "tokens=64"}
    growth = "n"

    tokens: int = 192
    heads: int = 14
    layers: tuple[int, ...] = (3, 7, 16)
    keep: tuple[int | float, ...] = ()

    def __post_init__(self) -> None:
        check_whole("tokens", self.tokens, 1)
        check_whole("heads", self.heads, 1)
        check_layers(self.layers, 1, BEFORE)
        check_schedule(self.tokens, self.keep, self.layers, SCHEDULES)

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous", rows="text", embeds=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = attention_of(ctx)
        rating = seen.rating(
            row_weight=rater_weights(ctx), pair_weight=1 / rope_kernel(seen), top_heads=self.heads
        )
        return ranked(ctx, self, rated(rating, ctx))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        schedule = self.keep or SCHEDULES[self.tokens]
        return thinned(schedule[self.layers.index(layer)], tokens, images)


def rope_kernel(seen: AttentionInputs) -> Tensor:
    """``R [B, rows, columns]`` float32: ``<rope(1, i), rope(1, j)> / sqrt(D)``, at least FLOOR of the same at ``i = j``."""
    cos, sin = (t.expand(len(seen.rows), -1, -1).float() for t in seen.rope)
    half = cos.shape[-1] // 2
    ones = cos + torch.cat([-sin[..., :half], sin[..., half:]], -1)  # rotate-half of a vector of ones
    past = seen.key.shape[2] - ones.shape[1]
    rows, columns = (
        ops.gather_tokens([ones], torch.where(at >= 0, at - past, -1))[0] for at in (seen.rows, seen.columns)
    )
    scale = ones.shape[-1] ** -0.5
    most = ones.square().sum(-1).amax(1)[:, None, None] * scale
    return torch.maximum(rows @ columns.transpose(1, 2) * scale, FLOOR * most)
