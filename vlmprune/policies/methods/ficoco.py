"""FiCoCo: a few tokens a layer go, those most alike the rest and least to the question, into those they correlate with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.errors import check
from vlmprune.ops.select_topk import positions_of
from vlmprune.policies.base import AttentionInputs, Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.checks import BEFORE, check_layers, check_share, check_word, share_of
from vlmprune.policies.choose import marks, quotas, select_counts
from vlmprune.policies.counts import keep_count
from vlmprune.policies.parts.sides import Sides


@dataclass(frozen=True)
class FiCoCo(PruningPolicy):
    """FiCoCo-L: at every stage the ``drop`` most redundant visual tokens are added to the tokens they correlate with.

    ``l(i, j)`` is the previous layer's logit, scaled query times key, head mean, without softmax and causal mask:
        filter: redundancy ``g sum_j l(i, j) - (1 - g) mean_t l(i, t)`` over visual j and text t;
        correlate: ``c(i, j) = a l(i, j) + (1 - a) sum_t l(i, t) l(t, j)``, j not i; of each dropped token those above the
            quantile ``epsilon`` of its row (``n - 1 - int(epsilon (n - 1))`` of n tokens, 2 of 576);
        compress: their rows gain the dropped one's, by the softmax of c over them.

    As released: sums, not means, so g weighs n terms against one; the first visual token always stays (the place of a CLS
    token); a dropped token may give to another dropped one, and that part is lost (the release masks those too late:
    ``targets="kept"`` is what it sets out to do); rows grow by what they gain (its FiCoCo-V divides: ``merge="mean"``).

    Not as released: it takes the first 576 positions for the image, system prompt included; here the image is the visual
    tokens, the text what follows the last of them, and a sample without text has neither term of it. It drops between
    attention and MLP of layers 5 to 31; here what enters the next layer is cut, after that MLP, and the last cut, behind
    which no layer is, falls away. Where every row ties at the quantile it merges nothing, here ties go to the lower number.

    Beside its Filter, Correlate and Compress (once a line is indented without which that file does not parse) on the same 64
    random prompts of 30 to 600 tokens, 14 or 42 dropped, float32: the same tokens stay in all of them, and the rows differ by
    at most 1.8e-6 of the largest.

    Only the dropped tokens' rows of logits are made, ``[B, dropped, n]`` float32, and query and key once in float32 by key
    head: what is summed over j or t is summed before the product.

    FiCoCo-V is left out: it merges 42 tokens in each layer of CLIP from the 12th on, inside the tower, by attention among
    what is left; behind the tower that would be another method (and its release carries scores from one image to the next).

    Args:
        layers: the stages, ascending.
        drop: tokens that go at each stage, a number per image (int) or a share of those entering (float, below 1).
        g, a: weights of the visual part of redundancy and correlation, in [0, 1].
        epsilon: quantile above which a token is correlated, in [0, 1].
        targets: ``"any"`` (released code) or ``"kept"``: which tokens may receive.
        merge: ``"sum"`` (released code) or ``"mean"``: the weighted one of what a row is and what it gains.
        positions: ``"keep"``, or ``"pack"`` (released code: 0, 1, 2, ... after every stage).

    ``Reduction.merged`` names of the kept tokens the one with the largest weight; -1 where none has any.
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
    presets = {
        192: "layers=2/3/4/5,drop=0.284,positions=pack",
        128: "layers=2/3/4/5,drop=0.3825,positions=pack",
        64: "layers=2/3/4/5,drop=0.5714,positions=pack",
        640: "layers=2/3/4/5,drop=0.3837,positions=pack",
        320: "layers=2/3/4/5,drop=0.5747,positions=pack",
        0.333: "layers=2/3/4/5,drop=0.2922",
        0.222: "layers=2/3/4/5,drop=0.397",
        0.111: "layers=2/3/4/5,drop=0.6125",
    }
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
        share = isinstance(self.drop, float) and 0 <= self.drop < 1
        whole = isinstance(self.drop, int) and not isinstance(self.drop, bool) and self.drop >= 0
        check(share or whole, "drop", "a share in [0, 1) or a whole number >= 0", repr(self.drop))
        for name in ("g", "a", "epsilon"):
            check_share(name, getattr(self, name))
        check_word("targets", self.targets, "any", "kept")
        check_word("merge", self.merge, "sum", "mean")

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, attention="previous", rows="all")

    def at(self, share: float) -> Self:
        return replace(self, drop=1 - share_of(share))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        if isinstance(self.drop, float):
            return keep_count(1 - self.drop, tokens)
        return min(tokens, max(1, round(tokens - self.drop * images)))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        kept = quotas(ctx, self)
        most = max((n - k for n, k in zip(ctx.counts, kept, strict=True)), default=0)
        if most == 0:
            return select_counts(ctx.mask.float(), ctx, kept)
        return self._merged(ctx, kept, most)

    def _merged(self, ctx: TokenContext, kept: list[int], most: int) -> Reduction:
        seen, N = ctx.given("attention"), ctx.mask.shape[1]
        sides = Sides.of(seen.chunk())
        score = seen.across_ranks(sides.lacking(self.g), "mean")
        score[:, :1].fill_(torch.inf)
        index = select_counts(score, ctx, kept)
        stays = marks(index, N)
        dropped = positions_of(ctx.mask & ~stays, most)
        weights = self._weights(ctx, seen, sides, dropped, stays)
        hidden = ctx.given("hidden")
        rows, gone = (ops.gather_tokens([hidden], at)[0].float() for at in (index, dropped))
        given = weights.gather(2, index.clamp(min=0)[:, None].expand(-1, most, -1))
        given = given.masked_fill((index < 0)[:, None], 0.0)
        rows = rows + given.transpose(1, 2) @ gone
        if self.merge == "mean":
            rows = rows / (1 + given.sum(1))[..., None]
        best, place = given.max(2)
        into = torch.where(best > 0, index.gather(1, place), -1)
        merged = torch.full((len(kept), N + 1), -1, dtype=torch.int64, device=index.device)
        merged = merged.scatter(1, torch.where(dropped < 0, N, dropped), into)[:, :N]
        return Reduction(index, rows.to(hidden.dtype), self.positions, merged=merged)

    def _weights(
        self, ctx: TokenContext, seen: AttentionInputs, sides: Sides, dropped: Tensor, stays: Tensor
    ) -> Tensor:
        """How much of each dropped token ``[B, r]`` every token is given: ``[B, r, N]`` float32, rows of sum 1; padding 0."""
        (B, r), N = dropped.shape, stays.shape[1]
        query = ops.gather_tokens([sides.query], dropped)[0]
        text = seen.across_ranks(query @ sides.text_key.transpose(1, 2), "mean")
        mixed = self.a * query + (1 - self.a) * text @ sides.text_query
        logits = seen.across_ranks(mixed @ sides.key.transpose(1, 2), "mean")
        itself = torch.arange(N, device=dropped.device) == dropped[..., None]
        barred = itself | ~(ctx.mask if self.targets == "any" else stays)[:, None]
        logits = logits.masked_fill(barred, -torch.inf).flatten(0, 1)
        few = [max(0, n - 1 - int(self.epsilon * (n - 1) + 1e-6)) for n in ctx.counts]
        limit = whole_numbers(tuple(few), dropped.device)[:, None].expand(-1, r).flatten()
        code = torch.where(barred, 2, 0).to(torch.int8).flatten(0, 1)
        chosen = marks(ops.select_topk(logits, limit, code=code)[0][:, : max(few)], N)
        weights = logits.masked_fill(~chosen, -torch.inf).softmax(-1).view(B, r, N)
        real = chosen.any(1).view(B, r) & (dropped >= 0)
        return weights.masked_fill(~real[..., None], 0.0)
