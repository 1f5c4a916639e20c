"""Visual tokens withdrawal: all of them leave at one deep layer, the layers behind it run on text alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from vlmprune.constants import counting
from vlmprune.errors import InputError
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.checks import check_layer


@dataclass(frozen=True)
class VTW(PruningPolicy):
    """Drops every visual token at ``layer``: by then, the papers find, text has taken over what they had to say.

    VTW's code has K = 15 for LLaVA-1.5-7B, and searches K for other models: the first layer, from 5 on, where the KL
    divergence between the next-token distributions of the pruned and the full model, a mean over some 20 prompts, is at most
    0.003 (0.0005 for LLaVA-1.5-13B). It keeps the rows' RoPE positions by default ("keep"); its other branch counts prompt
    and answer anew from 0 ("pack"). The rows left here are those of its cut; a run equals the one with all visual columns
    masked from the layer on.

    It is also YOPO's layer drop, the one of its four cuts that concerns tokens (at layer 20 of 40 in its script for
    LLaVA-1.5-13B, 24 of 28 for Qwen2-VL-7B). Its released code simulates the cut with masks. That for Qwen2-VL masks before
    the softmax, which is the same for the text's rows; that for LLaVA zeroes the weights of visual columns behind the
    softmax, so that the rest no longer sums to one, which no shorter sequence does. YOPO's other cuts drop no token and are
    not here: attention of visual tokens to their neighbours in the image only, heads that visual tokens do without, and
    part of the feed-forward neurons for them.

    A visual token that ends the prompt stays, as its row is what the answer goes on from. Whether one does is read once a
    prefill, so prompts cannot come in chunks; in a captured prefill every prompt has text behind its image.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later none of the visual ones.
        positions: RoPE positions of what stays: "keep" those they had, or "pack" them to 0, 1, 2, ... without gaps.

    Raises:
        InputError: a setting is out of range; ``at`` always: there is no share to set.
    """

    summary = "all visual tokens leave at one deep layer"
    paper = (
        "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference (AAAI 2025), "
        "arXiv 2405.05803; Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See, arXiv 2410.06169"
    )
    formula = "from layer K on keep none of the n; the last one where the prompt ends with it"
    growth = "n"

    layer: int = 15
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_layer(self.layer)

    def at(self, share: float) -> Self:
        raise InputError(f"VTW: expected a policy with a share to set, got {self!r}, which keeps nothing")

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """None; one of a prompt that ends with its image."""
        return 0

    def empties(self, layer: int) -> bool:
        return True

    def needs(self, layer: int) -> Needs:
        """Where the text behind the last image is: whether there is any."""
        return Needs(rows="text")

    def rank(self, ctx: TokenContext) -> Ranking:
        words = ctx.words or (1,) * len(ctx.counts)  # not known in a captured prefill, which has some
        keep = tuple(0 if text else min(n, 1) for n, text in zip(ctx.counts, words, strict=True))
        order = counting(len(keep), max(ctx.counts, default=0), ctx.device)  # the last token is the best
        return Ranking(order.float(), keep, positions=self.positions)
