"""Methods that act twice: before the language model, and once more inside it."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any, ClassVar, Self

from torch import Tensor

from vlmprune.policies.base import PruningPolicy, Ranking, Reduction, TokenContext
from vlmprune.policies.by_image import ranked
from vlmprune.policies.checks import check_keep, check_layer, share_of
from vlmprune.policies.counts import keep_count
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Groups


class TwoStages(PruningPolicy):
    """``keep`` tokens per image, or that share, enter the language model, and ``then`` of them the decoder layer ``layer``.

    ``spend`` is how the first stage spends its budget; the second keeps the best of the prompt. Which they are a method says
    by ``ctx.layer``, which is 0 at the first.
    """

    keep: int | float | None
    then: int | float
    layer: int
    round_up: ClassVar[bool] = False
    """Whether a share of the second stage is rounded up."""

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_keep(self.then, "then")
        check_layer(self.layer, 1, " (stage 1 is at layer 0)")

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, self.layer)

    def at(self, share: float) -> Self:
        """Both stages at this share."""
        both: dict[str, Any] = dict.fromkeys(("keep", "then"), share_of(share))
        return replace(self, **both)

    def spends(self, layer: int) -> str:
        return "prompt" if layer else self.spend

    def kept(self, tokens: int, images: float, layer: int) -> int:
        if not layer:
            return super().kept(tokens, images, layer)
        if self.round_up and isinstance(self.then, float):
            return min(tokens, max(1, ceil(self.then * tokens - 1e-6)))
        return keep_count(self.then, tokens, images)


class MergesFirst(TwoStages):
    """The first stage merges; the second does, too, or else keeps what the prompt's last row attends to most, as in FastV."""

    def first(self, ctx: TokenContext, crops: Groups) -> Tensor | Reduction:
        """The choice before the language model, of the crops of the images, of which there are some."""
        raise NotImplementedError(f"{type(self).__name__}: expected a `first` of its own, got none")

    def second(self, ctx: TokenContext) -> Tensor | Reduction:
        """The choice at ``layer``."""
        return super().select(ctx)

    def ranks(self, layer: int) -> bool:
        return super().ranks(layer) and layer > 0 and type(self).second is MergesFirst.second

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = ctx.given("attention")
        return ranked(ctx, self, seen.rating(seen.last), static=True)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        if ctx.layer:
            return self.second(ctx)
        crops = crops_of(ctx)
        return self.first(ctx, crops) if crops.crops else ctx.ordinals
