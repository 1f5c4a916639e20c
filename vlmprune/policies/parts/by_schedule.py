"""Methods whose published budgets are schedules: how many tokens of an image stay at each of a few layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vlmprune.policies.base import PruningPolicy, TokenContext
from vlmprune.policies.checks import BEFORE, check_layers, check_schedule, check_whole
from vlmprune.policies.counts import thinned
from vlmprune.policies.parts.stage_settings import at_stage


class BySchedule(PruningPolicy):
    """At each of ``layers`` as many tokens stay as a schedule says, but at most n - 1 of n.

    It is ``keep``, tokens per image or shares, or where that is empty the published one of the budget ``tokens``. Settings of
    a method whose count is not fixed may have none.
    """

    tokens: int
    layers: tuple[int, ...]
    keep: tuple[int | float, ...]
    schedules: ClassVar[Mapping[int, tuple[int, ...]]]
    """By budget, of an image of 576."""

    def __post_init__(self) -> None:
        check_whole("tokens", self.tokens, 1)
        check_layers(self.layers, 1, BEFORE)
        if self.fixed_count:
            check_schedule(self.tokens, self.keep, self.layers, self.schedules)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        schedule = self.keep or self.schedules[self.tokens]
        return thinned(at_stage(schedule, self.layers, layer), tokens, images)

    def scheduled(self, ctx: TokenContext) -> list[int]:
        """How many of each sample's tokens stay, whatever else a method's ``kept`` counts."""
        each = zip(ctx.counts, ctx.image_counts(), strict=True)
        return [BySchedule.kept(self, tokens, images, ctx.layer) for tokens, images in each]
