"""DART: a few pivot tokens, and around each the visual tokens that duplicate it least. No attention is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.checks import check_keep, check_layer, check_word
from vlmprune.policies.counts import keep_count
from vlmprune.policies.parts.pivots import as_a_set, largest, states_and_norms, taken_by


@dataclass(frozen=True)
class DART(PruningPolicy):
    """Keeps pivots and the tokens least like them: each pivot in turn takes the free tokens of lowest cosine to it.

    Pivots are the visual tokens, and the text tokens after the last image, with the largest L1 norm of the previous
    layer's keys (all heads, after RoPE). Text pivots choose but are no visual tokens. What is compared are the hidden
    states that enter the stage, behind the text model's last norm. All as released.

    Layer 0 is the variant before the language model that TensorRT-Edge-LLM ships: there are no keys yet, so input
    embeddings are what has the norms, and what is compared, without the last norm. Its counts and turns are those of
    ``DART(layer=0, count="exact", order="norm")`` for a prompt of one image. Readings: text pivots come from the text after
    the last image, there from all text; several images share one budget and its pivots, there each has its own.

    Not in the released code, which then fails: where pivots are missing, as there is too little text, the others take what
    these would have taken, and without any the largest norms decide. A sample keeps at least one token.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones; 0 = before the language model.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        pivots: visual and text pivots per sample.
        count: ``"released"``: every pivot takes ``keep // all pivots``, on top of the visual pivots themselves (128
            becomes 132); ``"exact"``: exactly ``keep``, pivots included, shared out evenly, the first taking the rest.
        order: the pivots' turns. ``"norm"``: the largest norm first, visual pivots before text pivots; ``"released"``: as
            CPython walks the set of their positions in the prompt, filled in that order.
    """

    summary = "tokens that duplicate a few pivots least, without attention"
    paper = 'Stop Looking for "Important Tokens" in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494'
    formula = (
        "p_i = ∑_h ‖k_i[K-1][h]‖₁;  P = the 4 visual and 4 text tokens of highest p  (pivots=(4, 4))\n"
        "y_i = norm(x_i), the text model's last norm\n"
        "each i of P in turn takes the ⌊k / 8⌋ free j of lowest cos(y_i, y_j)  (order='released')\n"
        "keep the visual tokens of P and all that are taken  (count='released')"
    )
    # none for 160: of LLaVA-NeXT's tokens two full layers alone are a mean of 180
    presets = each(
        "layer=2,keep={},count=exact",
        of={192: 166, 128: 98, 64: 30, 640: 490, 320: 149, 0.333: 0.2816, 0.222: 0.1621, 0.111: 0.0426},
    )
    growth = "n"  # a few pivots, each compared with all

    layer: int = 2
    keep: int | float = 128
    pivots: tuple[int, int] = (4, 4)
    count: Literal["released", "exact"] = "released"
    order: Literal["released", "norm"] = "released"

    def __post_init__(self) -> None:
        check_layer(self.layer, 0)
        check_keep(self.keep)
        two = isinstance(self.pivots, tuple) and len(self.pivots) == 2
        ok = two and all(isinstance(p, int) and p >= 0 for p in self.pivots) and sum(self.pivots) > 0
        check(ok, "pivots", "a number of visual and one of text pivots, not both 0", repr(self.pivots))
        check_word("count", self.count, "released", "exact")
        check_word("order", self.order, "released", "norm")

    def needs(self, layer: int) -> Needs:
        """What enters the stage, images and text; behind layer 0 the previous layer's keys, and which of them are text."""
        entering = Needs(hidden=True, text=True)
        return entering | Needs(attention="previous", rows="text", keys_only=True) if layer else entering

    def select(self, ctx: TokenContext) -> Tensor:
        """Pivots first, then what each takes, in as many rounds as there are pivots; no host sync."""
        if ctx.mask.shape[1] == 0:
            return ctx.ordinals
        first, total = zip(*map(self._counts, ctx.counts, ctx.image_counts()), strict=True)
        states, norms = states_and_norms(ctx)
        pivots = largest(ctx, norms, first, self.pivots[1])
        if self.order == "released":
            pivots = as_a_set(ctx, pivots)
        code = taken_by(pivots, states, [t - f for f, t in zip(first, total, strict=True)], ctx.mask)
        left = whole_numbers(total, ctx.device) - (code == 1).sum(1)
        return ops.select_topk(norms[:, : ctx.mask.shape[1]], left, code=code)[0][:, : max(total)]

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """With "released" up to the visual pivots more than ``keep``, or up to one less for each pivot."""
        return self._counts(tokens, images)[1]

    def _counts(self, tokens: int, images: float) -> tuple[int, int]:
        """Of one sample: how many visual pivots, and how many tokens stay."""
        if not tokens:
            return 0, 0
        keep, pivots = keep_count(self.keep, tokens, images), sum(self.pivots)
        if self.count == "exact":
            return min(self.pivots[0], keep), keep
        first = min(self.pivots[0], tokens)
        return first, min(tokens, max(1, first + keep // pivots * pivots))
