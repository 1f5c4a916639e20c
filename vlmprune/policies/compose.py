"""Policies made of policies: several layers (Stages), or two choices at the same layers (Union, Intersection)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from vlmprune.errors import InputError, check
from vlmprune.policies.base import Growth, Needs, PruningPolicy, Ranking, Reduction, TokenContext
from vlmprune.policies.checks import share_of
from vlmprune.policies.choose import index_of, marks
from vlmprune.policies.counts import union_count
from vlmprune.policies.growth import worst

SHARED: Mapping[str, Any] = {"earlier_kv": "full", "rectify": False}
"""The settings of every policy, with what a member says that leaves them to the whole."""


def check_member(whole: PruningPolicy, member: PruningPolicy, name: str) -> None:
    """Raise ValueError if a member asks for more than the whole, whose own settings are the ones that count."""
    for setting, usual in SHARED.items():
        own, asked = getattr(whole, setting), getattr(member, setting)
        expected = f"{setting}={own!r} as {type(whole).__name__} itself has it"
        check(asked in (own, usual), name, expected, repr(member))


def joint(one: PruningPolicy, other: PruningPolicy) -> dict[str, Any]:
    """Those settings of two policies made one; where they differ, the one that their combination then refuses."""
    both = {setting: (getattr(one, setting), getattr(other, setting)) for setting in SHARED}
    return {setting: a if a == b else SHARED[setting] for setting, (a, b) in both.items()}


@dataclass(frozen=True)
class Stages(PruningPolicy):
    """Applies several policies, each at its own layers; a later one chooses among what earlier ones kept.

    Args:
        policies: the policies, in any order; kept in the order of their layers.

    Raises:
        ValueError: no policy, something that is not a policy, two policies at one layer, or one with
            ``earlier_kv="compact"`` or ``rectify=True`` where the whole has not (its own settings count).
    """

    summary = "several policies, each at its own layers"

    policies: Sequence[PruningPolicy]

    def __post_init__(self) -> None:
        check(isinstance(self.policies, tuple), "policies", "a list of policies", repr(self.policies))
        check(len(self.policies) > 0, "policies", "at least one policy", "none")
        for policy in self.policies:
            check(isinstance(policy, PruningPolicy), "policies", "policies only", repr(policy))
            check_member(self, policy, "policies")
        object.__setattr__(self, "policies", tuple(sorted(self.policies, key=lambda p: p.layers)))
        for layer in self.layers:
            here = [p for p in self.policies if layer in p.layers]
            both = " and ".join(map(repr, here))
            check(len(here) == 1, "policies", "one policy per layer", f"{both} at layer {layer}")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(layer for policy in self.policies for layer in policy.layers))

    @property
    def growth(self) -> Growth | None:
        """The worst of its policies."""
        return worst(policy.growth for policy in self.policies)

    @property
    def packs(self) -> bool:
        return any(policy.packs for policy in self.policies)

    @property
    def inserts(self) -> bool:
        return any(policy.inserts for policy in self.policies)

    def needs(self, layer: int) -> Needs:
        return self._policy(layer).needs(layer)

    def ranks(self, layer: int) -> bool:
        return self._policy(layer).ranks(layer)

    @property
    def fixed_count(self) -> bool:
        return all(policy.fixed_count for policy in self.policies)

    def empties(self, layer: int) -> bool:
        return self._policy(layer).empties(layer)

    def rank(self, ctx: TokenContext) -> Ranking:
        return self._policy(ctx.layer).rank(ctx)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        return self._policy(ctx.layer).select(ctx)

    def at(self, share: float) -> Self:
        """Each at this share, but one that keeps nothing anyway; where all of them are such, that one says so."""
        some = [not all(map(policy.empties, policy.layers)) for policy in self.policies]
        each = zip(self.policies, some if any(some) else [True] * len(some), strict=True)
        return replace(self, policies=tuple(policy.at(share) if fits else policy for policy, fits in each))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return self._policy(layer).kept(tokens, images, layer)

    def spends(self, layer: int) -> str:
        return self._policy(layer).spends(layer)

    def forget(self) -> None:
        for policy in self.policies:
            policy.forget()

    def _policy(self, layer: int) -> PruningPolicy:
        check(layer in self.layers, "layer", f"one of {self.layers}", layer)
        return next(policy for policy in self.policies if layer in policy.layers)


@dataclass(frozen=True)
class Pair(PruningPolicy):
    """Two policies that choose at the same layers; what becomes of their choices is up to the subclass.

    Args:
        first: a policy.
        second: another one with the same layers. Both only drop tokens: what one changes the other cannot know.

    Raises:
        ValueError: one of them is not a policy or runs a second wave, their layers differ, or one has ``earlier_kv="compact"`` or
            ``rectify=True`` where the pair has not (its own settings count; ``p | q`` and ``p & q`` take theirs from both).
    """

    first: PruningPolicy
    second: PruningPolicy

    def __post_init__(self) -> None:
        for name, policy in (("first", self.first), ("second", self.second)):
            check(isinstance(policy, PruningPolicy), name, "a policy", repr(policy))
            check_member(self, policy, name)
            # who brings tokens back counts on what its own first stage has left
            alone = any(policy.needs(layer).wave for layer in policy.layers)
            check(not alone, name, "a policy without a second wave", repr(policy))
        same = self.first.layers == self.second.layers
        check(same, "second", f"a policy with the layers {self.first.layers}", self.second.layers)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.first.layers

    @property
    def growth(self) -> Growth | None:
        """The worse of the two."""
        return worst((self.first.growth, self.second.growth))

    fixed_count = False  # it depends on their overlap

    def needs(self, layer: int) -> Needs:
        return self.first.needs(layer) | self.second.needs(layer)

    def forget(self) -> None:
        self.first.forget()
        self.second.forget()

    def choices(self, ctx: TokenContext) -> tuple[Tensor, Tensor]:
        """What each policy keeps, as marks ``[B, N]`` bool."""
        return self._marks(self.first, ctx), self._marks(self.second, ctx)

    def _marks(self, policy: PruningPolicy, ctx: TokenContext) -> Tensor:
        choice = policy.select(ctx)
        if isinstance(choice, Reduction):
            name = type(self).__name__.lower()
            raise InputError(
                f"{name}: expected policies that only drop tokens, got {policy!r}, which changes them"
            )
        return marks(choice, ctx.mask.shape[1])


@dataclass(frozen=True)
class Union(Pair):
    """Keeps what either of two policies keeps; ``p | q``.

    How much that is depends on their overlap: ``at`` and ``kept`` say what is expected if they know nothing of each other.
    """

    summary = "what either of two policies keeps"

    def select(self, ctx: TokenContext) -> Tensor:
        """The union of both choices. Its width is known only on the device: one host read."""
        one, other = self.choices(ctx)
        return index_of(one | other)

    def at(self, share: float) -> Self:
        """Both at the share whose union is expected to be this one."""
        each = 1 - math.sqrt(1 - share_of(share))
        return replace(self, first=self.first.at(each), second=self.second.at(each))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """The expected number: at least the larger of both, at most their sum."""
        one, other = (policy.kept(tokens, images, layer) for policy in (self.first, self.second))
        return union_count(one, other, tokens)


@dataclass(frozen=True)
class Intersection(Pair):
    """Keeps what both of two policies keep; ``p & q``.

    Where they agree on nothing, a sample keeps the first policy's choice: a sample with visual tokens never loses all.
    How much stays depends on their overlap: ``at`` and ``kept`` say what is expected if they know nothing of each other.
    """

    summary = "what both of two policies keep"

    def select(self, ctx: TokenContext) -> Tensor:
        """The intersection of both choices. Its width is known only on the device: one host read."""
        one, other = self.choices(ctx)
        both = one & other
        return index_of(torch.where(both.any(1, keepdim=True), both, one))

    def at(self, share: float) -> Self:
        """Both at the share whose intersection is expected to be this one."""
        each = math.sqrt(share_of(share))
        return replace(self, first=self.first.at(each), second=self.second.at(each))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """The expected number: at most the smaller of both."""
        one, other = (policy.kept(tokens, images, layer) for policy in (self.first, self.second))
        return min(tokens, max(1, one + other - union_count(one, other, tokens)))
