"""GreedyPrune: the visual tokens most like the prompt's last token, one after another, none of them like another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.by_image import spent
from vlmprune.policies.checks import check_keep, check_layer, is_number
from vlmprune.policies.choose import choose_greedily


@dataclass(frozen=True)
class GreedyPrune(PruningPolicy):
    """Keeps the most salient tokens of which no two have a cosine above ``tau``, found greedily. No attention is read.

    A token is as salient as its cosine to the last text token. In falling order of that, a token stays unless it is too
    close to one that stays already: greedy for the paper's problem, the largest sum of saliencies of ``keep`` tokens whose
    cosines are all at most ``tau``. Where too few pass, the most salient of those left out fill up. A token of no direction
    (zero, NaN) is like none.

    No code of the authors was found, nor could the paper's text be had: saliency and problem are those that its reviews
    quote. A reading are: where it acts (reviews speak of shallow layers; here FastV's); what is compared, for both cosines
    the hidden states entering the stage; that a prompt gets its number of tokens in any case; and ``tau``, 0.9 in the one
    other implementation found. That is of vLLM, on a layer's values, and fills up in the same way: given the same states
    its procedure and this kept the same of 1,500 random sets. A prompt that ends with its image has no text token behind it:
    all its tokens are then equally salient.

    The cosines of all pairs are held at once: N * N float32 a sample, by "image" or "crop" those of each.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones; 0 = before the language model.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        tau: largest cosine of two tokens that stay, in [-1, 1]; 1.0 = saliency alone decides.
        spend: "prompt": the best tokens of all images of a prompt stay; "image": every image keeps its own budget; "crop":
            which is shared out evenly over its crops (tiles, small view, frames).
    """

    summary = "tokens most like the last word, none of them like another, without attention"
    paper = (
        "GreedyPrune: Retenting Critical Visual Token Set for Large Vision Language Models, arXiv 2506.13166"
    )
    formula = (
        "s_j = cos(x_j, x_last), 0 where the prompt ends with its image\n"
        "in falling order of s_j: keep j if cos(x_i, x_j) ≤ tau for every i kept so far, until k are kept\n"
        "if they are fewer, keep the highest s_j of the others, too"
    )
    checked = "reading"
    presets = {
        192: "layer=2,keep=166",
        128: "layer=2,keep=98",
        64: "layer=2,keep=30",
        640: "layer=2,keep=490",
        320: "layer=2,keep=149",  # two full layers alone are a mean of 180
        0.333: "layer=2,keep=0.2816",
        0.222: "layer=2,keep=0.1621",
        0.111: "layer=2,keep=0.0426",
    }
    growth = "n^2"  # cosines of all pairs

    layer: int = 2
    keep: int | float = 0.5
    tau: float = 0.9
    spend: Literal["prompt", "image", "crop"] = "prompt"

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_keep(self.keep)
        check(is_number(self.tau) and -1 <= self.tau <= 1, "tau", "a cosine in [-1, 1]", repr(self.tau))

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, text=True)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        hidden = ctx.given("hidden")
        salience = torch.cosine_similarity(hidden.float(), _last_word(ctx).float(), dim=-1)
        return spent(ctx, self, partial(choose_greedily, "nms", threshold=self.tau), hidden, salience)


def _last_word(ctx: TokenContext) -> Tensor:
    """``[B, 1, D]`` state of the last text token behind the images; zeros where there is none."""
    text = ctx.given("text")
    states = ctx.given("text_hidden")
    last = (text >= 0).sum(1, keepdim=True) - 1
    return ops.gather_tokens([states], last)[0]
