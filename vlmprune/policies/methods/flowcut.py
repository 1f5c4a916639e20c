"""FlowCut: where information flows from CLS, layer by layer of the tower; what little flows to is left on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.errors import check, require
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext, VisionAttention
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import quota_of, ranked, vision_of
from vlmprune.policies.checks import check_keep
from vlmprune.policies.choose import marks
from vlmprune.policies.crops import crops_of
from vlmprune.policies.inputs import Rating


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
        quota = quota_of(ctx, self, crops)
        there = crops.padding(ctx.device)
        if there is None:
            there = torch.ones(len(crops.tokens), max(crops.tokens), dtype=torch.bool, device=ctx.device)
        left, score = there, None
        count, target = (whole_numbers(x, ctx.device) for x in (crops.tokens, quota.kept))
        for ahead, layer in zip(range(len(self.vision_layers))[::-1], self.vision_layers, strict=True):
            flow = Flow.of(vision_of(ctx, layer, crops))
            relation, here = flow.among(left)
            score = here if score is None else 0.5 * score + 0.5 * here
            if ahead % 2 == 0:
                count = _fewer(relation, count, target, ahead)
                code = torch.where(left, 0, 2).to(torch.int8)
                left = marks(ops.select_topk(score, count, code=code)[0], left.shape[1])
        # what is left has 1, and is as many as stay
        return ranked(ctx, self, crops.spread(left.float(), fill=-1), self.positions)


class Flow(NamedTuple):
    """What flows to the tokens of every crop in one layer, float32.

    Attributes:
        relation, semantic: ``[I, T, H]`` softmax over all keys of what CLS's query, and its value, have in common with each
            token; without CLS the mean attention received, of one head, and None.
        own: ``[I, H]`` each, what CLS has in common with itself.
        parts: how many keys a token stands for.
        strength: ``[I, T]`` L1 norm of the value, head mean.
    """

    relation: Tensor
    semantic: Tensor | None
    own: tuple[Tensor, ...]
    parts: int
    strength: Tensor

    @classmethod
    def of(cls, seen: VisionAttention) -> Self:
        """Of one layer."""
        value = require(seen.value, "ctx.vision", "values (declare Needs(values=True))")
        mean = value.mean(1, dtype=torch.float32)[:, int(seen.cls) :]
        strength = seen.per_token(mean.abs().sum(-1))
        parts = 1 if seen.cells is None or seen.shares is not None else seen.cells.shape[2]
        if not seen.cls:
            received = seen.received()[..., None]
            return cls(received, None, (torch.zeros_like(received[:, 0]),), parts, strength)
        alike = replace(seen, query=value, key=value, scale=1.0)
        heads = [Rating(one.rating().scoring._replace(head_reduce="none")).scores() for one in (seen, alike)]
        own = tuple(1 - one.sum(2) for one in heads)
        relation, semantic = (seen.per_token(one.transpose(1, 2)) for one in heads)
        return cls(relation, semantic, own, parts, strength)

    def among(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """``[I, T]`` each: the share of relation of every token among those ``left``, and its score; 0 for others."""
        both = [] if self.semantic is None else [self.semantic]
        shares = []
        for flow, own in zip([self.relation, *both], self.own, strict=True):
            there = flow.masked_fill(~left[..., None], 0.0)
            per_head = there / (there.sum(1) * self.parts + own)[:, None]
            mean = per_head.mean(2)
            shares.append(mean / mean.sum(1, keepdim=True))
        return shares[0], sum(shares[1:], shares[0]) * self.strength


def _fewer(relation: Tensor, count: Tensor, target: Tensor, ahead: int) -> Tensor:
    """``[I]`` how many of ``count`` tokens of every crop stay with ``ahead`` layers still to be read: 0 = the target."""
    if ahead == 0:
        return target
    entropy = torch.special.entr(relation).sum(1) / count.clamp(min=2).log()
    gone = ((count - target) / ahead**0.5 * (1 - entropy.square())).nan_to_num(0.0).round()
    return torch.maximum(count - gone.clamp(min=0).long(), target)
