"""PriorTR: what the question looks at beyond what the model looks at anyway, in bits: attention against a null token's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.policies.base import AttentionInputs, Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import BEFORE, check_keep, check_layer, check_whole, check_word
from vlmprune.policies.parts.raters import rated

LEAST = 1e-10
"""Added to every share before the logarithm and to every sum before the division, as released."""


@dataclass(frozen=True)
class PriorTR(PruningPolicy):
    """Keeps the tokens of highest ``p log(p / q)``: p the question's attention, q that of a null token, in layer ``layer - 1``.

    The null token stands right behind the image (a newline, an end mark): by the causal mask it has seen the image and no
    word of the question, so that q is where the model looks anyway. p and q are softmax over the whole row, then head mean
    (``heads``), then divided by their sums over the visual tokens that enter.

    As released, but for what it does not meet: a batch is scored sample by sample (one of its versions scores the first
    alone), and behind several images the null token is the one behind the last of them. A sample with no text behind its null
    token, or none at all, goes by p (p is q there), one without text behind its image keeps tokens spread evenly. The last
    prompt row counts to the question (LLaVA's and InternVL's versions; that for Qwen leaves it out). Its LLaVA version cuts
    the cache of all layers: ``earlier_kv="compact"``.

    Not here: its variant that runs the prompt a second time without the question, for q.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones; at least 1.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        rows: whose attention p is: ``"text"``, the mean over all text behind the last image (null token included), or
            ``"last"`` (released for LLaVA-NeXT).
        heads: ``"mean"`` or ``"max"`` over the heads.
        null: which text token behind the last image is the null token, 0 = the first; 1 for InternVL, whose end mark
            stands before the newline.
        spend: "prompt": the best tokens of all images of a prompt stay; "image": every image keeps its own budget; "crop":
            which is shared out over its crops (tiles, small view, frames).
    """

    summary = "the question's attention against that of a token which has not read it"
    paper = (
        "Accelerating Multimodal Large Language Models with Prior-Corrected Token Reduction (ECCV 2026), "
        "arXiv 2606.24156"
    )
    formula = (
        "a_j = mean_t mean_h A[K-1][h, t, j]  (rows='text')\n"
        "b_j = mean_h A[K-1][h, t, j] of the first t behind the image  (null=0)\n"
        "p_j = a_j / ∑_j a_j,  q_j = b_j / ∑_j b_j\n"
        "s_j = p_j log(p_j / q_j)\n"
        "keep the k highest s_j"
    )
    presets = {
        192: "keep=152",
        128: "keep=81",
        64: "keep=11",
        640: "keep=408",
        320: "keep=55",  # three full layers alone are a mean of 270
        0.333: "keep=0.253",
        0.222: "keep=0.1287",
        0.111: "keep=0.0043",
    }
    growth = "n"

    layer: int = 3
    keep: int | float = 192
    rows: Literal["text", "last"] = "text"
    heads: Literal["mean", "max"] = "mean"
    null: int = 0
    spend: Literal["prompt", "image", "crop"] = "prompt"

    def __post_init__(self) -> None:
        check_layer(self.layer, 1, BEFORE)
        check_keep(self.keep)
        check_word("rows", self.rows, "text", "last")
        check_word("heads", self.heads, "mean", "max")
        check_whole("null", self.null, 0)

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous", rows="text")

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = ctx.given("attention")
        if not seen.rows.shape[1]:
            return ranked(ctx, self, rated(torch.zeros(ctx.mask.shape, device=ctx.device), ctx))
        last, null = seen.rows.amax(1, keepdim=True), _null(seen, self.null)
        p, q = (self._shares(seen, rows) for rows in (seen.rows if self.rows == "text" else last, null))
        gain = p * torch.log((p + LEAST) / (q + LEAST))
        known = (null >= 0) & (null < last)
        return ranked(ctx, self, rated(torch.where(known, gain, p), ctx))

    def _shares(self, seen: AttentionInputs, rows: Tensor) -> Tensor:
        """``[B, N]`` float32: what of the attention that ``rows`` pay to visual tokens each of them gets."""
        paid = seen.received(rows, head_reduce=self.heads)
        return paid / (paid.sum(1, keepdim=True) + LEAST)


def _null(seen: AttentionInputs, null: int) -> Tensor:
    """``[B, 1]`` the row of the null token, -1 = there is none."""
    row = seen.rows[:, null : null + 1]
    return row if row.shape[1] else torch.full_like(seen.last, -1)
