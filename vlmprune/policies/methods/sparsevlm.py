"""SparseVLM: the question's own words rate the visual tokens; what is pruned comes back as a few merged tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import Growth, Needs, Positions, PruningPolicy, Ranking, Reduction, TokenContext
from vlmprune.policies.checks import BEFORE, check_flag, check_layers, check_schedule, check_whole, check_word
from vlmprune.policies.counts import thinned
from vlmprune.policies.inputs import Rating
from vlmprune.policies.parts.raters import rated, rater_weights, row_attention
from vlmprune.policies.parts.recycle import recycle_counts, recycled

SCHEDULES: Mapping[int, tuple[int, ...]] = {
    192: (300, 200, 110),
    128: (303, 110, 36),
    96: (238, 48, 26),
    64: (66, 30, 17),
}
RANKS: Mapping[int, tuple[float, float]] = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}
LAYERS: Mapping[str, tuple[int, ...]] = {"1.5": (3, 7, 16), "paper": (3, 7, 16), "1.0": (3, 7, 16, 20)}


@dataclass(frozen=True)
class SparseVLM(PruningPolicy):
    """Keeps the tokens that the text raters attend to, mean over raters and heads, softmax over the whole row.

    Raters are the words after the image that its embeddings match above average. The best 30 % of what is pruned,
    ``int(0.3 P) + 1`` tokens, are clustered by density peaks into ``int(m / 10) + 1`` tokens that follow the kept ones
    and compete at the next stage. The released code breaks ties of density by noise, this by position.

    Where nothing can rate (not in the paper): a sample without text after its image keeps tokens spread evenly, one
    whose attention is all NaN its first ones. By rank (the last two versions below) both keep all: it counts as full.

    How many are kept of n tokens (at least 1, at most n - 1):
        version "1.5" (the released code behind the published tables): a fixed schedule per budget. "192 tokens" is an
        average over layers, as its authors count it, of an image of 576.
        version "1.0" (first release): ``int(rank * scale + bias)``; all of them where the rank is n.
        version "paper" (reading): ``n - int(scale * (n - rank))``, all of them where nothing is deleted. The paper
        gives neither its lambda (``scale``, here 1) nor a tolerance; the rank is that of the head-mean attention of
        the raters to the visual tokens, as in the first release, with torch's default tolerance.

    The last two read the rank back: one host sync per stage.

    Args:
        tokens: budget 192, 128, 96 (only "1.5") or 64, which names a schedule; counts are per image.
        layers: the stages: one more than the layers whose output is thinned. () = the version's own.
        version: ``"1.5"``, ``"1.0"`` or ``"paper"``.
        keep: an explicit schedule for "1.5" in place of the budget's, per layer tokens per image or shares; () = none.
        scale, bias: for the rank; None = the budget's ("1.0"), or 1 and 0 ("paper").
        recycle: whether pruned tokens come back merged.
        merge: ``"mean"`` of a cluster (released code) or ``"sum"`` (paper text).
        positions: ``"keep"``, a merged token having its cluster centre's, or ``"pack"`` (released code: positions count
            from 0 again).

    Raises:
        ValueError: a setting is out of range, or does not belong to the version.
    """

    summary = "rated by the question's words; pruned tokens recycled as cluster means"
    paper = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, arXiv 2410.04417"
    formula = (
        "r_t = mean_j softmax_t(e_j · e_t) over all j of the prompt;  R = {t: r_t > mean_t r_t} or all t\n"
        "s_j = mean_{t ∈ R} mean_h A[K-1][h, t, j]\n"
        "keep the k(tokens) highest s_j, by its schedule, at most n - 1  (version='1.5')\n"
        "of the others the m = ⌊0.3 (n - k)⌋ + 1 highest s_j become c = ⌊m / 10⌋ + 1 tokens  (recycle=True)\n"
        "centres: highest exp(-mean of c least d²) · min d to denser i, or max d; d_ij² = mean (x_i - x_j)²\n"
        "each joins its nearest centre; the clusters' means of x_j follow what stays  (merge='mean')"
    )
    presets = {
        192: "tokens=192,positions=pack",
        128: "tokens=128,positions=pack",
        64: "tokens=64,positions=pack",
        640: "keep=0.3839/0.3839/0.3839,positions=pack",  # no schedule is released for these: one share, for the mean over all layers
        0.333: "keep=0.51/0.51/0.51",
        0.222: "keep=0.3439/0.3439/0.3439",
    }

    tokens: int = 192
    layers: tuple[int, ...] = ()
    version: Literal["1.5", "1.0", "paper"] = "1.5"
    keep: tuple[int | float, ...] = ()
    scale: float | None = None
    bias: float | None = None
    recycle: bool = True
    merge: Literal["mean", "sum"] = "mean"
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_word("version", self.version, "1.5", "1.0", "paper")
        if self.layers == ():
            object.__setattr__(self, "layers", LAYERS[self.version])
        check_layers(self.layers, 1, BEFORE)
        check_flag("recycle", self.recycle)
        check_word("merge", self.merge, "mean", "sum")
        check_whole("tokens", self.tokens, 1)
        for name, number in (("scale", self.scale), ("bias", self.bias)):
            check(number is None or isinstance(number, int | float), name, "a number or None", repr(number))
        if self.version == "1.5":
            no_rank = self.scale is None and self.bias is None
            check(no_rank, "scale", "None, and no bias, for version '1.5'", f"{self.scale} and {self.bias}")
            check_schedule(self.tokens, self.keep, self.layers, SCHEDULES)
            return
        check(self.keep == (), "keep", f"() for version {self.version!r}, which counts by rank", self.keep)
        scale, bias = (1.0, 0.0) if self.version == "paper" else RANKS.get(self.tokens, (None, 0.0))
        scale = scale if self.scale is None else float(self.scale)
        check(scale is not None, "tokens", "192, 128 or 64, or a scale, for version '1.0'", self.tokens)
        check(scale is not None and scale > 0, "scale", "a number > 0", scale)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "bias", bias if self.bias is None else float(self.bias))

    @property
    def growth(self) -> Growth:
        """Clustering compares all pairs of what it recycles."""
        return "n^2" if self.recycle else "n"

    @property
    def fixed_count(self) -> bool:
        return self.version == "1.5"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=self.recycle, attention="previous", rows="text", embeds=True)

    def ranks(self, layer: int) -> bool:
        return super().ranks(layer) and not self.recycle

    def rank(self, ctx: TokenContext) -> Ranking:
        """The choice without recycling."""
        return Ranking(*self._rated(ctx), positions=self.positions)

    def _rated(self, ctx: TokenContext) -> tuple[Tensor | Rating, tuple[int, ...]]:
        weights = rater_weights(ctx)
        return rated(ctx.given("attention").rating(row_weight=weights), ctx), tuple(self._kept(ctx, weights))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        if not self.recycle:
            return super().select(ctx)
        rating, kept = self._rated(ctx)
        scores = rating.scores() if isinstance(rating, Rating) else rating
        hidden = ctx.given("hidden")
        index, rows, merged = recycled(scores, hidden, ctx, kept, self.merge)
        return Reduction(index, rows, self.positions, merged=merged)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Exact for version "1.5", recycled tokens included. Raises InputError for the others, whose ranks are not known."""
        fixed = self.version == "1.5"
        check(fixed, "version", "'1.5' for counts that are known in advance", repr(self.version))
        best = self._best(tokens, images, layer)
        return best + (recycle_counts(tokens - best)[1] if self.recycle else 0)

    def _best(self, tokens: int, images: float, layer: int) -> int:
        """How many stay as they are in version "1.5"."""
        schedule = self.keep or SCHEDULES[self.tokens]
        return thinned(schedule[self.layers.index(layer)], tokens, images)

    def _kept(self, ctx: TokenContext, weights: Tensor) -> list[int]:
        """How many tokens each sample keeps, before recycling."""
        if self.version == "1.5":
            each = zip(ctx.counts, ctx.image_counts(), strict=True)
            return [self._best(tokens, images, ctx.layer) for tokens, images in each]
        assert self.scale is not None and self.bias is not None
        kept: list[int] = []
        for n, rank in zip(ctx.counts, attention_ranks(ctx, weights), strict=True):
            if self.version == "paper":
                wanted = n - int(self.scale * (n - rank))
            else:
                wanted = n if rank >= n else min(int(rank * self.scale + self.bias), n - 1)
            kept.append(min(n, max(1, wanted)))
        return kept


def attention_ranks(ctx: TokenContext, weights: Tensor) -> list[int]:
    """Rank of each sample's head-mean attention ``[raters, visual tokens]``; its tokens if it has none or a NaN. Host sync."""
    seen = ctx.given("attention")
    shares = seen.across_ranks(row_attention(seen).mean(1), "mean") * weights[..., None]
    # matrix_rank's own default, for the matrix without the rows and columns that are padding or no raters
    tokens = ctx.mask.sum(1)
    tolerance = torch.maximum(weights.sum(1), tokens.float()) * torch.finfo(torch.float32).eps
    finite = shares.isfinite().all(2).all(1)
    ranks = torch.linalg.matrix_rank(shares.where(finite[:, None, None], 0.0), rtol=tolerance)
    known: list[int] = torch.where(finite & weights.any(1), ranks, tokens).tolist()
    return known
