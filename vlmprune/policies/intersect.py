"""A policy made of two: what both of them keep (Intersection), written ``p & q``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.sets import index_of, marks


@dataclass(frozen=True)
class Intersection(PruningPolicy):
    """Keeps what both of two policies keep; ``p & q``. How much that is depends on their overlap.

    Where they agree on nothing, a sample keeps the first policy's choice: a sample with visual tokens never loses all.

    Args:
        first: a policy.
        second: another one with the same layers.

    Raises:
        ValueError: one of them is not a policy, or their layers differ.
    """

    summary: ClassVar[str] = "what both of two policies keep"

    first: PruningPolicy
    second: PruningPolicy

    def __post_init__(self) -> None:
        for name, policy in (("first", self.first), ("second", self.second)):
            check(isinstance(policy, PruningPolicy), name, "a policy", repr(policy))
        same = self.first.layers == self.second.layers
        check(same, "second", f"a policy with the layers {self.first.layers}", self.second.layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of both."""
        return self.first.layers

    def needs(self, layer: int) -> Needs:
        """What either policy reads."""
        return self.first.needs(layer) | self.second.needs(layer)

    def select(self, ctx: TokenContext) -> Tensor:
        """The intersection of both choices. Its width is known only on the device: one host read."""
        one, other = (marks(_plain(policy, ctx), ctx.mask.shape[1]) for policy in (self.first, self.second))
        both = one & other
        return index_of(torch.where(both.any(1, keepdim=True), both, one))


def _plain(policy: PruningPolicy, ctx: TokenContext) -> Tensor:
    """What a policy keeps; one that also changes the tokens cannot be joined with another choice."""
    choice = policy.select(ctx)
    if isinstance(choice, Reduction):
        raise ValueError(
            f"intersection: expected policies that only drop tokens, got {policy!r}, which changes them"
        )
    return choice
