"""What the masked run is told of a pruned one: what the policy said at each stage, and who stands for whom behind it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.policies.base import Needs, PruningPolicy, Ranking, Reduction, TokenContext

Answer = tuple[Tensor, Tensor | Reduction]
"""Positions in the prompt of the tokens that entered a stage, ``[B, N]`` and -1 = padding, and what the policy said."""


class Second(NamedTuple):
    """An ``Answer`` at a stage before which a second wave runs."""

    entered: Tensor
    answer: Tensor | Reduction


Standing = list[dict[int, float]]
"""Per sample, for how many tokens of the prompt each position stands that a stage kept."""


@dataclass(frozen=True, repr=False)
class Recorded(PruningPolicy):
    """Another policy, whose latest answers are remembered by layer; with ``rectify`` also who stands for how many."""

    policy: PruningPolicy
    answers: dict[int, Answer] = field(default_factory=dict)
    standing: dict[int, Standing] = field(default_factory=dict)

    def __repr__(self) -> str:
        return repr(self.policy)

    @property
    def layers(self) -> tuple[int, ...]:
        """The policy's."""
        return self.policy.layers

    def needs(self, layer: int) -> Needs:
        """The policy's, and the rows where it is to be told how alike they are."""
        needs = self.policy.needs(layer)
        return replace(needs, hidden=True) if self.rectify else needs

    def ranks(self, layer: int) -> bool:
        """As the policy: what is recorded runs along its road."""
        return self.policy.ranks(layer)

    def empties(self, layer: int) -> bool:
        """As the policy."""
        return self.policy.empties(layer)

    def rank(self, ctx: TokenContext) -> Ranking:
        """What the policy says; remembered as what it would select."""
        self.select(ctx)
        return self.policy.rank(ctx)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        """What the policy says."""
        answer = self.policy.select(ctx)
        said = ctx.positions, answer
        self.answers[ctx.layer] = Second(*said) if self.needs(ctx.layer).wave else said
        if self.rectify:
            before = [self.standing[layer] for layer in self.layers if layer < ctx.layer]
            alone = not before or self.needs(ctx.layer).restored  # who comes back stands for itself again
            self.standing[ctx.layer] = standing(ctx, as_reduction(answer), None if alone else before[-1])
        return answer


def standing(ctx: TokenContext, change: Reduction, before: Standing | None) -> Standing:
    """Who stands for how many behind a stage: one token after the other, each by the closest by cosine of those that stay."""
    assert ctx.hidden is not None
    made: Standing = []
    for b, (positions, row) in enumerate(zip(ctx.positions.tolist(), change.index.tolist(), strict=True)):
        kept = [number for number in row if number >= 0]
        rows = ctx.hidden[b, kept] if change.hidden is None else change.hidden[b, : len(kept)]
        counts = {positions[number]: 0.0 for number in kept}
        for number, position in enumerate(positions):
            if position < 0 or not kept:  # where none stays, none stands for those that go
                continue
            alike = torch.cosine_similarity(ctx.hidden[b, number][None].float(), rows.float(), dim=1)
            into = -1 if change.merged is None else int(change.merged[b, number])
            best = positions[number if number in kept else into if into >= 0 else kept[int(alike.argmax())]]
            counts[best] += 1.0 if before is None else before[b][position]
        made.append(counts)
    return made


def as_reduction(answer: Tensor | Reduction) -> Reduction:
    """A policy's answer; an index alone keeps contents and positions."""
    return answer if isinstance(answer, Reduction) else Reduction(answer)
