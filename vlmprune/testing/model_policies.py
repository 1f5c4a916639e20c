"""The policies that ``check_model`` runs when told none: random choices, so that no selection can hide what the wiring does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vlmprune.models.host.families import FAMILIES
from vlmprune.policies.base import Needs, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.compose import Stages
from vlmprune.policies.fastv import FastV
from vlmprune.policies.random import Random


@dataclass(frozen=True)
class Rewritten(PruningPolicy):
    """A random half, backwards, each row half way to the first visual token, without gaps in the positions."""

    summary: ClassVar[str] = "everything that a policy may change"

    layer: int = 2

    @property
    def layers(self) -> tuple[int, ...]:
        """The one stage."""
        return (self.layer,)

    def needs(self, layer: int) -> Needs:
        """The rows."""
        return Needs(hidden=True)

    def select(self, ctx: TokenContext) -> Reduction:
        """The rows in their new order."""
        index = Random(self.layer).select(ctx).sort(1, descending=True).values
        assert ctx.hidden is not None
        rows = ctx.hidden.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, ctx.hidden.shape[2]))
        return Reduction(index, rows.lerp(ctx.hidden[:, :1], 0.5), "pack")


def default_policies(config: Any) -> list[PruningPolicy]:
    """One that drops, one with two stages, one that changes all it may: at layers that are legal for the family."""
    family, depth = FAMILIES[config.model_type], config.text_config.num_hidden_layers
    early = family.first(config)
    late = (early + depth) // 2
    found: list[PruningPolicy] = [Random(late, keep=0.3)]
    if early < late:
        found.append(Stages([Random(early, keep=0.6, seed=1), FastV(late)]))
    if family.packs:
        found.append(Rewritten(late))
    return found
