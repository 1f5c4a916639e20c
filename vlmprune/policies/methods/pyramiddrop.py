"""PyramidDrop: halve the visual tokens at several depths, by the attention the last prompt row is about to pay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from vlmprune.errors import check
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.checks import check_keep, check_layers
from vlmprune.policies.choose import quotas
from vlmprune.policies.counts import keep_count


@dataclass(frozen=True)
class PyramidDrop(PruningPolicy):
    """Keeps at each stage the tokens the last prompt row attends to most in the stage's OWN layer, mean over heads.

    Query and key are projected from what enters the layer, ahead of it; the softmax spans the whole row. The last
    instruction row of the paper is the last prompt row at inference.

    Counts: with a float, ``int(previous * ratio)``, the paper's text. The released code takes a list of shares of the
    UNPRUNED image instead, ``int(n * shares[stage])``; give ``ratio`` that list as a tuple. Its 0.5, 0.25, 0.125 are
    the default 0.5 to the token, for every n. A sample with visual tokens never loses the last one (not in either).

    Args:
        layers: the stages, ascending.
        ratio: share kept of the tokens entering each stage, or for each stage the share of the unpruned tokens.
        positions: ``"keep"``, or ``"pack"`` (released code: positions count from 0 again after every stage).
    """

    summary = "a pyramid of stages, by the attention of the stage's own layer"
    paper = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction, "
        "arXiv 2410.17247"
    )
    formula = (
        "s_j = mean_h A[K][h, last, j], of what enters layer K\n"
        "at every stage K keep the k(ratio) highest s_j"
    )
    # a quarter of the layers is full: of less than that, budgets cannot be met
    presets = {192: "ratio=0.255,positions=pack", 0.333: "layers=7/14/21,ratio=0.252"}
    growth = "n"

    layers: tuple[int, ...] = (8, 16, 24)
    ratio: float | tuple[float, ...] = 0.5
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_layers(self.layers, 0)
        for share in self.ratio if isinstance(self.ratio, tuple) else (self.ratio,):
            check_keep(share, "ratio", counts=False)
        if isinstance(self.ratio, tuple):
            falling = sorted(self.ratio, reverse=True) == [*self.ratio]
            right = falling and len(self.ratio) == len(self.layers)
            check(right, "ratio", f"{len(self.layers)} falling shares of the image", repr(self.ratio))

    def at(self, share: float) -> Self:
        return replace(self, ratio=share)

    @property
    def fixed_count(self) -> bool:
        return not isinstance(self.ratio, tuple)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Exact for a float. For shares of the unpruned image within one token, and only if nothing else has pruned it."""
        if not isinstance(self.ratio, tuple):
            return keep_count(self.ratio, tokens)
        stage = self.layers.index(layer)
        return keep_count(self.ratio[stage] / (self.ratio[stage - 1] if stage else 1.0), tokens)

    def needs(self, layer: int) -> Needs:
        return Needs(attention="own")

    def rank(self, ctx: TokenContext) -> Ranking:
        seen = ctx.given("attention")
        return Ranking(seen.rating(seen.last), self._kept(ctx), positions=self.positions, static=True)

    def _kept(self, ctx: TokenContext) -> tuple[int, ...]:
        if not isinstance(self.ratio, tuple):
            return tuple(quotas(ctx, self))
        share = self.ratio[self.layers.index(ctx.layer)]
        whole = map(sum, ctx.images())
        return tuple(min(n, max(1, int(all_of * share))) for n, all_of in zip(ctx.counts, whole, strict=True))
