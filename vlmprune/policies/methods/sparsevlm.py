"""SparseVLM: the question's own words rate the visual tokens; what is pruned comes back as a few merged tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import Growth, Needs, Positions, Ranking, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.checks import check_flag, check_word
from vlmprune.policies.parts.by_rank import by_rank, line_of
from vlmprune.policies.parts.by_schedule import BySchedule
from vlmprune.policies.parts.raters import rated, rater_weights
from vlmprune.policies.parts.recycle import recycle_counts, recycled


@dataclass(frozen=True)
class SparseVLM(BySchedule):
    """Keeps the tokens that the text raters attend to, mean over raters and heads, softmax over the whole row.

    Raters are the words after the image that its embeddings match above average. The best 30 % of what is pruned,
    ``m = int(0.3 P) + 1`` tokens, are clustered by density peaks into ``int(m / 10) + 1`` tokens that follow the kept ones and
    compete at the next stage. The released code breaks ties of density by noise, this by position.

    Where nothing can rate (not in the paper), a sample without text after its image keeps tokens spread evenly, one whose
    attention is all NaN its first ones. By rank (versions "1.0" and "paper") both keep all: it counts as full.

    Args:
        tokens: budget 192, 128, 96 (only "1.5") or 64, which names a schedule; counts are per image.
        layers: the stages: one more than the layers whose output is thinned. () = the version's own.
        version: says how many of n tokens stay, at least 1 and at most n - 1. "1.5" (the released code behind the published
            tables): a fixed schedule per budget; "192 tokens" is an average over layers, as its authors count it, of an image
            of 576. "1.0" (first release): ``int(rank * scale + bias)``, all of them where the rank is n. "paper" (a reading, as
            the paper gives neither its lambda, ``scale``, here 1, nor a tolerance): ``n - int(scale * (n - rank))``, all of
            them where nothing is deleted. The rank is the first release's, of the head-mean attention of raters to visual
            tokens, with torch's default tolerance; reading it back is one host sync per stage.
        keep: an explicit schedule for "1.5" in place of the budget's, per layer tokens per image or shares; () = none.
        scale, bias: what the rank is multiplied by, and what is added; None = the budget's ("1.0"), or 1 and 0 ("paper").
        recycle, merge: whether pruned tokens come back (``recycle``), as their clusters' ``"mean"`` (released) or ``"sum"`` (paper).
        positions: ``"keep"``, a merged token having its cluster centre's, or ``"pack"`` (released: they count from 0 again).
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
    # for 640 and shares no schedule is released: one share, for the mean over all layers
    presets = {n: f"tokens={n},positions=pack" for n in (192, 128, 64)} | each(
        "keep={0}/{0}/{0}", counts=",positions=pack", of={640: 0.3839, 0.333: 0.51, 0.222: 0.3439}
    )
    schedules = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}

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
            object.__setattr__(self, "layers", (3, 7, 16, 20) if self.version == "1.0" else (3, 7, 16))
        super().__post_init__()
        check_flag("recycle", self.recycle)
        check_word("merge", self.merge, "mean", "sum")
        line = line_of(self.version, self.tokens, self.keep, self.scale, self.bias)
        for name, number in zip(("scale", "bias"), line, strict=True):
            object.__setattr__(self, name, number)

    @property
    def growth(self) -> Growth:
        return "n^2" if self.recycle else "n"  # clustering compares all pairs

    @property
    def fixed_count(self) -> bool:
        return self.version == "1.5"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=self.recycle, attention="previous", rows="text", embeds=True)

    def ranks(self, layer: int) -> bool:
        return super().ranks(layer) and not self.recycle

    def rank(self, ctx: TokenContext) -> Ranking:
        """The choice without recycling."""
        scores = rated(ctx.given("attention").rating(row_weight=rater_weights(ctx)), ctx)
        kept = self.scheduled(ctx) if self.fixed_count else by_rank(ctx, self.scale, self.bias, self.version)
        return Ranking(scores, tuple(kept), positions=self.positions)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        return recycled(ctx, self.rank(ctx), self.merge) if self.recycle else super().select(ctx)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Recycled tokens included. Raises InputError where ranks, which are not known, say it."""
        check(self.fixed_count, "version", "'1.5' for counts that are known in advance", repr(self.version))
        best = super().kept(tokens, images, layer)
        return best + (recycle_counts(tokens - best)[1] if self.recycle else 0)
