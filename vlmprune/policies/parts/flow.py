"""What flows from CLS to the tokens of every crop in one layer of the vision tower, and how many of them are then left."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from vlmprune.errors import require
from vlmprune.policies.base import VisionAttention
from vlmprune.policies.inputs import Rating


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


def fewer(relation: Tensor, count: Tensor, target: Tensor, ahead: int) -> Tensor:
    """How many tokens of every crop stay: the fewer, the more uneven the ``relation`` is; at last the target.

    Args:
        relation: ``[I, T]``, shares that add up to 1 over the tokens that are left.
        count: ``[I]`` int64, how many these are.
        target: ``[I]`` int64, how many shall stay in the end; never fewer do.
        ahead: how many layers are still to be read.
    """
    if ahead == 0:
        return target
    entropy = torch.special.entr(relation).sum(1) / count.clamp(min=2).log()
    gone = ((count - target) / ahead**0.5 * (1 - entropy.square())).nan_to_num(0.0).round()
    return torch.maximum(count - gone.clamp(min=0).long(), target)
