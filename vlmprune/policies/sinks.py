"""Attention sinks left out of the competition: visual tokens that draw attention whatever they show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from vlmprune.constants import whole_numbers
from vlmprune.errors import check
from vlmprune.policies.base import Needs, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.checks import check_whole, is_number
from vlmprune.policies.compose import check_member
from vlmprune.policies.wrapping import Wrapping

EPSILON = 1e-6
"""Of the RMS norm, as in the paper's code."""


@dataclass(frozen=True)
class WithoutSinks(Wrapping):
    """Another ranking, in which attention sinks come behind all other tokens: as many stay, but a sink only for want of others.

    A token is a sink if its hidden state, divided by its own root mean square, exceeds ``tau`` in magnitude in a sink
    dimension: so "See What You Are Told" finds visual sinks. Attention to them says little of the image, and where they
    survive pruning they take the place of what does (2604.20937, whose own score counts attention over video frames).
    Hidden states that enter the first layers have no such values yet: they appear within the first few layers of a decoder.

    A reading: the paper finds the dimensions of each language model by hand, from what its first token has. Without
    ``dimensions`` any one counts. To exceed 20 it must hold more than 400 of the D squares that a state of D dimensions
    has on average, which no token of less than 400 dimensions can.

    Args:
        method: a policy that ranks at each of its layers, or ``Stages`` of such. What it keeps whatever the score (a grid,
            the newest token) stays. Of sinks that stay the first in the prompt do.
        tau: how large a value of the normed state is for a sink, greater than 0.
        dimensions: sink dimensions, e.g. (1415, 2533) of LLaVA-1.5-7B and (2100, 4743) of 13B; () = all.

    Raises:
        ValueError: ``method`` is not such a policy, or asks for ``earlier_kv`` or ``rectify`` where this one does not; a
            setting is out of range, also, when it ranks, of the model's dimensions.

    Example:
        >>> from vlmprune import FastV, WithoutSinks
        >>> WithoutSinks(FastV(layer=3, keep=64)).layers
        (3,)
    """

    summary = "another ranking without attention sinks"
    paper = (
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models (ICLR 2025), arXiv 2503.03321; "
        "Sink-Token-Aware Pruning for Fine-Grained Video Understanding in Efficient Video LLMs, arXiv 2604.20937"
    )
    checked = "reading"

    method: PruningPolicy
    tau: float = 20.0
    dimensions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(isinstance(self.method, PruningPolicy), "method", "a policy", repr(self.method))
        check_member(self, self.method, "method")
        ranks = all(self.method.ranks(layer) for layer in self.method.layers)
        check(ranks, "method", "a policy that ranks at each of its layers", repr(self.method))
        check(is_number(self.tau) and self.tau > 0, "tau", "a number greater than 0", repr(self.tau))
        check(isinstance(self.dimensions, tuple), "dimensions", "a tuple of them", repr(self.dimensions))
        for dimension in self.dimensions:
            check_whole("dimensions", dimension, 0)

    @property
    def inside(self) -> PruningPolicy:
        return self.method

    def needs(self, layer: int) -> Needs:
        return super().needs(layer) | Needs(hidden=True)

    def empties(self, layer: int) -> bool:
        return self.method.empties(layer)

    def rank(self, ctx: TokenContext) -> Ranking:
        return self.method.rank(ctx).behind(self.sinks(ctx))

    def sinks(self, ctx: TokenContext) -> Tensor:
        """``[B, N]`` bool, True at sinks. What is not finite is none."""
        hidden = ctx.given("hidden").float()
        size = hidden.square().mean(2, keepdim=True).add(EPSILON).rsqrt()
        if self.dimensions:
            most = max(self.dimensions)
            check(most < hidden.shape[2], "dimensions", f"below the model's {hidden.shape[2]}", most)
            hidden = hidden.index_select(2, whole_numbers(self.dimensions, hidden.device))
        return (hidden.abs() * size).amax(2) > self.tau

    def at(self, share: float) -> Self:
        return replace(self, method=self.method.at(share))
