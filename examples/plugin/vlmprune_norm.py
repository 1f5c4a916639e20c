"""A policy of another package: keeps the visual tokens whose hidden states have the largest norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmprune.policies import (
    Needs,
    PruningPolicy,
    Ranking,
    TokenContext,
    check_keep,
    check_layer,
    ranked,
)


@dataclass(frozen=True)
class Norm(PruningPolicy):
    """Keeps the tokens with the largest L2 norm entering ``layer``. An example, not a method anyone proposed."""

    summary: ClassVar[str] = "tokens with the largest hidden states (example plugin)"
    growth = "n"

    layer: int = 2
    keep: int | float = 0.5

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_keep(self.keep)

    @property
    def layers(self) -> tuple[int, ...]:
        """The one stage."""
        return (self.layer,)

    def needs(self, layer: int) -> Needs:
        """The hidden states of the visual tokens."""
        return Needs(hidden=True)

    def rank(self, ctx: TokenContext) -> Ranking:
        """The best of every prompt: vlmprune selects them and shortens everything in one fused pass."""
        return ranked(ctx, self, ctx.given("hidden").float().norm(dim=-1))
