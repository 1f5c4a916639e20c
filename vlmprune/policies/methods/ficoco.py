"""FiCoCo: a few tokens a layer go, those most alike the rest and least to the question, into those they correlate with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor

from vlmprune.ops.select_topk import positions_of
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.checks import BEFORE, check_layers, check_share, check_word, share_of
from vlmprune.policies.choose import marks, quotas, select_counts
from vlmprune.policies.parts.giving import given, shares
from vlmprune.policies.parts.sides import Sides
from vlmprune.policies.parts.stage_settings import check_drop, left_after


@dataclass(frozen=True)
class FiCoCo(PruningPolicy):
    """FiCoCo-L: at every stage the ``drop`` most redundant visual tokens are added to the tokens they correlate with.

    Filter: redundant is what is like all visual tokens and unlike the text. Correlate: what goes is given to the tokens that it
    is like, itself and by way of the text, by more than the quantile ``epsilon`` of its row (2 of 576). Compress: their rows
    gain its own, by the softmax over them; ``Reduction.merged`` names the kept one that gains most, or -1. Like means the
    previous layer's logit: scaled query times key, head mean, without softmax and causal mask.

    As released: sums count, not means, so g weighs n terms against one; the first visual token always stays (the place of a CLS
    token); a dropped token may give to another dropped one, and that part is lost (the release masks those too late:
    ``targets="kept"`` is what it sets out to do); rows grow by what they gain (its FiCoCo-V divides: ``merge="mean"``).

    Not as released: it takes the first 576 positions for the image, system prompt included; here the image is the visual
    tokens, the text what follows the last of them, and a sample without text has neither term of it. It drops between attention
    and MLP of layers 5 to 31, we behind that MLP, and behind the last layer not at all. Where every row ties at the quantile it
    merges nothing; here ties go to the lower number. Its Filter, Correlate and Compress (once a line is indented without which
    that file does not parse) keep the same tokens of 64 random prompts of 30 to 600 tokens, 14 or 42 dropped, float32, and rows
    differ by at most 1.8e-6 of the largest. FiCoCo-V is left out: it merges 42 tokens in each layer of CLIP from the 12th on,
    which behind the tower would be another method (and its release carries scores from one image to the next).

    Args:
        layers: the stages, ascending.
        drop: tokens that go at each stage, a number per image (int) or a share of those entering (float, below 1).
        g, a, epsilon: weights of the visual part of redundancy (g) and of correlation (a), and the latter's quantile, in [0, 1].
        targets: ``"any"`` (released code) or ``"kept"``: which tokens may receive.
        merge: ``"sum"`` (released code) or ``"mean"``: the weighted one of what a row is and what it gains.
        positions: ``"keep"``, or ``"pack"`` (released code: 0, 1, 2, ... after every stage).
    """

    summary = "a few tokens a layer, redundant and far from the text, merged into correlated ones"
    paper = (
        "Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration (AAAI 2026; first: Rethinking "
        "Token Reduction in MLLMs), arXiv 2411.17686"
    )
    formula = (
        "b_ij = mean_h z[K-1][h, i, j], without causal mask\n"
        "s_i = (1 - g) mean_t b_it - g ∑_j b_ij\n"
        "keep the first token and of the others the highest s_i; drop for every image go\n"
        "c_ij = a b_ij + (1 - a) ∑_t b_it b_tj\n"
        "w_ij = softmax_j c_ij over the n - 1 - ⌊epsilon (n - 1)⌋ highest c_ij, j ≠ i  (targets='any')\n"
        "x_j ← x_j + ∑_i w_ij x_i over all i that go  (merge='sum')"
    )
    # ours: the released 14 a layer from layer 6 on are a mean of 422, and no schedule is given for these
    presets = each(
        "layers=2/3/4/5,drop={},positions=pack",
        of={192: 0.284, 128: 0.3825, 64: 0.5714, 640: 0.3837, 320: 0.5747},
    ) | each("layers=2/3/4/5,drop={}", of={0.333: 0.2922, 0.222: 0.397, 0.111: 0.6125})
    growth = "n^2"  # every dropped token is compared with every other

    layers: tuple[int, ...] = tuple(range(6, 32))
    drop: int | float = 14
    g: float = 0.6
    a: float = 0.6
    epsilon: float = 0.998
    targets: Literal["any", "kept"] = "any"
    merge: Literal["sum", "mean"] = "sum"
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_layers(self.layers, 1, BEFORE)
        check_drop(self.drop)
        for name in ("g", "a", "epsilon"):
            check_share(name, getattr(self, name))
        check_word("targets", self.targets, "any", "kept")
        check_word("merge", self.merge, "sum", "mean")

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, attention="previous", rows="all")

    def at(self, share: float) -> Self:
        return replace(self, drop=1 - share_of(share))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return left_after(self.drop, tokens, images)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        kept = quotas(ctx, self)
        most = max((n - k for n, k in zip(ctx.counts, kept, strict=True)), default=0)
        if most == 0:
            return select_counts(ctx.mask.float(), ctx, kept)
        sides = Sides.of(ctx.given("attention"))
        score = sides.lacking(self.g)
        score[:, :1].fill_(float("inf"))
        index = select_counts(score, ctx, kept)
        stays = marks(index, ctx.mask.shape[1])
        dropped = positions_of(ctx.mask & ~stays, most)
        receive = ctx.mask if self.targets == "any" else stays
        weights = shares(sides.correlation(self.a, dropped), dropped, receive, ctx.counts, self.epsilon)
        rows, merged = given(ctx.given("hidden"), index, dropped, weights, self.merge == "mean")
        return Reduction(index, rows, self.positions, merged=merged)
