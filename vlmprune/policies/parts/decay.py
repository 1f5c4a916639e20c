"""Methods that merge before the language model and then drop a few tokens at each of several layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

from torch import Tensor

from vlmprune.policies.base import PruningPolicy, Reduction, TokenContext
from vlmprune.policies.checks import BEFORE, check_keep, check_layer, check_share, check_whole, share_of


class LinearDecay(PruningPolicy):
    """``keep`` tokens per image, or that share, enter the language model; their number falls in a straight line over layers.

    ``last`` is which share of them the last of the ``stages`` layers, of which ``layer`` is the first, leaves. What enters is
    chosen by ``first``, the same number of every crop; what stays of it later by ``rank``, the best of the prompt.
    """

    keep: int | float
    layer: int
    stages: int
    last: float

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(self.layer, 1, BEFORE)
        check_whole("stages", self.stages, 1)
        check_share("last", self.last)

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, *range(self.layer, self.layer + self.stages))

    def at(self, share: float) -> Self:
        """``share`` before the language model, and ``share`` of that after the last stage."""
        both: dict[str, Any] = dict.fromkeys(("keep", "last"), share_of(share))
        return replace(self, **both)

    def spends(self, layer: int) -> str:
        return "prompt" if layer else "crop"

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """At layer 0 what ``keep`` says; later what keeps to the line, one token at least."""
        if not layer:
            return super().kept(tokens, images, layer)
        past = layer - self.layer
        before, after = (1 - (1 - self.last) * stages / self.stages for stages in (past, past + 1))
        return min(tokens, max(1, round(after / before * tokens)))

    def first(self, ctx: TokenContext) -> Tensor | Reduction:
        """The choice before the language model."""
        raise NotImplementedError(f"{type(self).__name__}: expected a `first` of its own, got none")

    def ranks(self, layer: int) -> bool:
        return layer > 0 and super().ranks(layer)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        return super().select(ctx) if ctx.layer else self.first(ctx)
