"""FlowCut: where information flows from CLS, layer by layer of the tower; what little flows to is left on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.constants import whole_numbers
from vlmprune.errors import check
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import quota_of, ranked, vision_of
from vlmprune.policies.checks import check_keep
from vlmprune.policies.choose import best_among, marks
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.flow import Flow, fewer


@dataclass(frozen=True)
class FlowCut(PruningPolicy):
    """Follows CLS through the tower: at every second layer those of least ``(relation + semantic) x strength`` so far go.

    ``relation`` is the attention of CLS, ``semantic`` the softmax of its value times the other values, both head means and
    divided by their sums; ``strength`` is the L1 norm of a token's value, head mean. From layer to layer the scores are halved
    and half of the new ones added. r layers before the last one read, r even, ``(n - k) / sqrt(r) (1 - H²)`` of the n tokens
    left go, H being the entropy of ``relation`` as a share of ``log n``, but never below k; at the last one all but k. How
    many go on the way depends on the data and stays on the device; k is known.

    A reading: the released code shortens the tower itself. Here it runs whole, its layers are read, and the same choice is
    made behind it: what CLS looks at is shared out over itself and the tokens still there, head by head, but their states are
    those of a tower in which nobody has left, as are the features that stay. Up to the first cut the two are the same. A crop
    is cut by its own entropy; the released code takes the largest number of a batch, which tiles are.

    In a tower without CLS the mean attention received takes the place of CLS's, and nothing is semantic (its version for
    Qwen2-VL, which then goes on inside the language model). Where tokens are several patches, or parts of them, each is their
    mean. Its second step for LLaVA-NeXT, by values of the language model's second layer, is left out: k is all that enters.

    Query, key and value of all the layers are held until the prompt has been pruned: for LLaVA-1.5 78 MB an image in half
    precision.

    Args:
        keep: k, tokens per image (int) or share (float), shared out evenly over its crops.
        vision_layers: the tower's layers that are read, ascending, first = 0: in CLIP's 24 those up to the last but two, behind
            which the released code has cut all.
        positions: ``"keep"`` their own, or ``"pack"`` (released code: positions 0, 1, 2, ...).
    """

    summary = "information flow from CLS, by attention and values, accumulated through the tower's layers"
    paper = (
        "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models (NeurIPS 2025), "
        "arXiv 2505.19536"
    )
    formula = (
        "w_j = the value of token j;  a_j = mean_h V[l][h, CLS, j],  b_j = mean_h softmax_j(w_CLS · w_j)\n"
        "c_j = (a_j / ∑_j a_j + b_j / ∑_j b_j) ‖mean_h w_j‖₁, each among CLS and the tokens left\n"
        "s_j = c_j in the first layer, then s_j = s_j / 2 + c_j / 2\n"
        "m = tokens left, r = layers still to be read, H = entropy of a_j / ∑_j a_j, divided by log m\n"
        "r even: keep the max(k, m - round((m - k) (1 - H²) / √r)) highest s_j; at last, r = 0: k"
    )
    checked = "reading"
    presets = each("keep={}", counts=",positions=pack")
    growth = "n"

    keep: int | float = 128
    vision_layers: tuple[int, ...] = tuple(range(22))
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        layers = self.vision_layers
        known = (
            isinstance(layers, tuple) and len(layers) > 0 and all(type(n) is int and n >= 0 for n in layers)
        )
        rising = known and list(layers) == sorted(set(layers))
        check(rising, "vision_layers", "one or more layers, ascending from 0", repr(layers))

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        """Query, key and value of all these layers."""
        return Needs(vision=self.vision_layers, values=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ranked(ctx, self, ctx.mask.float(), self.positions)
        left, score = crops.padding(ctx.device), None
        if left is None:
            left = torch.ones(len(crops.tokens), max(crops.tokens), dtype=torch.bool, device=ctx.device)
        kept = quota_of(ctx, self, crops).kept
        count, target = (whole_numbers(x, ctx.device) for x in (crops.tokens, kept))
        for ahead, layer in zip(range(len(self.vision_layers))[::-1], self.vision_layers, strict=True):
            relation, here = Flow.of(vision_of(ctx, layer, crops)).among(left)
            score = here if score is None else 0.5 * score + 0.5 * here
            if ahead % 2 == 0:
                count = fewer(relation, count, target, ahead)
                left = marks(best_among(score, count, left), left.shape[1])
        # what is left has 1, and is as many as stay
        return ranked(ctx, self, crops.spread(left.float(), fill=-1), self.positions)
