"""MustDrop: a key set of every image stays, and of the rest what the text attends to, in sum or by a single word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Self

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.errors import check
from vlmprune.policies.base import (
    AttentionInputs,
    Needs,
    Positions,
    PruningPolicy,
    Ranking,
    Reduction,
    TokenContext,
    outcome,
)
from vlmprune.policies.by_image import vision_of
from vlmprune.policies.checks import (
    BEFORE,
    check_keep,
    check_layers,
    check_number,
    check_share,
    check_whole,
    share_of,
)
from vlmprune.policies.choose import index_of, marks, quotas
from vlmprune.policies.counts import keep_count
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.attention_maps import attention_maps
from vlmprune.policies.parts.raters import rated


@dataclass(frozen=True)
class MustDrop(PruningPolicy):
    """At every stage a token goes to which all text and every single text token pay little attention, unless it is a key token.

    Attention is that of the layer before, softmax over the whole row, head mean, of all text rows behind the last image. A
    token goes if the sum over the rows is below ``global_thr`` of what all visual tokens get and the largest of a row is
    below ``individual_thr``. Key tokens, ``ceil(key_share P)`` of every crop's P, have the most CLS attention in a vision
    layer (head mean; without a CLS token the mean attention received) and never go.

    How many stay so depends on the data: the count is read back at every stage. With ``keep`` it is known ahead: the tokens
    of the highest ``max(sum / (global_thr total), largest / individual_thr)`` stay, key tokens before all others. Where the
    thresholds keep as many, that is the same choice.

    A reading: its first step, inside the tower, is left out: behind the first of CLIP's layers it makes one token of every 3 x
    3 window whose mean cosine is at least 0.8. Behind the tower nothing is known of these states, so here the tower and the
    layers before the first stage see every token, and key tokens are a share of these. Its last step, the cache of the
    layers between the stages cut to what stays at last, is ``earlier_kv="compact"``, which cuts the first layers too. The
    release stands for one image behind one text, and its positions start from 0 again.

    Not in the paper: a sample without text behind its image keeps everything by the thresholds (as the released comparison
    would have it), by ``keep`` its key tokens and others spread evenly.

    Args:
        layers: the stages, ascending: those behind the released 2, 6, 10 and 14.
        global_thr: share of the attention of all visual tokens, above 0; released: 0.001 and 0.001 for 192 tokens on average,
            0.0012 and 0.001 for 128, 0.011 and 0.01 for 64.
        individual_thr: attention of one row, above 0.
        keep: None = the thresholds decide; else tokens per image (int) or share of those entering (float), the same at every
            stage or a tuple of one for each.
        key_share: share of every crop's tokens that are key tokens, in [0, 1].
        vision_layer: vision-tower layer whose CLS attention chooses them.
        positions: ``"keep"``, or ``"pack"`` (released code: positions count from 0 again after every stage).
    """

    summary = "what no word attends to goes, at several depths, but for a key set of every image"
    paper = "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model, arXiv 2411.10803"
    formula = (
        "C = of every crop the ⌈key_share · n⌉ tokens of highest mean_h V[vision_layer][h, CLS, j]\n"
        "a_tj = mean_h A[K-1][h, t, j];  b_j = ∑_t a_tj / ∑_j ∑_t a_tj\n"
        "s_j = max(b_j / global_thr, max_t a_tj / individual_thr)\n"
        "keep j if s_j ≥ 1 or j ∈ C  (keep=None)\n"
        "by keep the k(keep) of highest s_j, those in C before all others"
    )
    checked = "reading"
    # ours: shares in place of the thresholds, which meet a budget on average alone
    presets = {
        192: "keep=0.628,positions=pack",
        128: "keep=0.479,positions=pack",
        64: "keep=0.118,positions=pack",
        640: "keep=0.4762,positions=pack",
        320: "keep=0.121,positions=pack",
        0.333: "keep=0.5973",
        0.222: "keep=0.4296",
    }
    growth = "n"

    layers: tuple[int, ...] = (3, 7, 11, 15)
    global_thr: float = 0.001
    individual_thr: float = 0.001
    keep: int | float | tuple[int | float, ...] | None = None
    key_share: float = 0.08
    vision_layer: int = -1
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_layers(self.layers, 1, BEFORE)
        for name in ("global_thr", "individual_thr"):
            check_number(name, getattr(self, name), above=0)
        each = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        for entry in each if self.keep is not None else ():
            check_keep(entry)
        fits = not isinstance(self.keep, tuple) or len(each) == len(self.layers)
        check(fits, "keep", f"{len(self.layers)} entries, one per layer", repr(self.keep))
        check_share("key_share", self.key_share)
        check_whole("vision_layer", self.vision_layer)

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous", rows="text", vision=(self.vision_layer,))

    @property
    def fixed_count(self) -> bool:
        return self.keep is not None

    def at(self, share: float) -> Self:
        return replace(self, keep=share_of(share))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """Raises InputError where the thresholds decide."""
        check(self.keep is not None, "keep", "a number or share for counts that are known in advance", None)
        keep = self.keep[self.layers.index(layer)] if isinstance(self.keep, tuple) else self.keep
        assert keep is not None
        return keep_count(keep, tokens, images)

    def ranks(self, layer: int) -> bool:
        return super().ranks(layer) and self.keep is not None

    def rank(self, ctx: TokenContext) -> Ranking:
        sums, largest = self._attended(ctx.given("attention"))
        share = sums / sums.sum(1, keepdim=True)
        scores = torch.maximum(share / self.global_thr, largest / self.individual_thr)
        order = rated(scores, ctx).nan_to_num(-1.0, torch.inf).argsort(dim=1, descending=True, stable=True)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        behind = torch.zeros_like(order).scatter(1, order, places)
        first = self._keys(ctx) * order.shape[1]
        return Ranking((first - behind).float(), tuple(quotas(ctx, self)), positions=self.positions)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        if self.keep is not None:
            return super().select(ctx)
        sums, largest = self._attended(ctx.given("attention"))
        goes = (sums < sums.sum(1, keepdim=True) * self.global_thr) & (largest < self.individual_thr)
        stays = ctx.mask & (~goes | self._keys(ctx))
        none = ctx.mask & ~stays.any(1, keepdim=True)
        stays = stays | (none & (none.cumsum(1) == 1))
        return outcome(index_of(stays), self.positions)

    def _attended(self, seen: AttentionInputs) -> tuple[Tensor, Tensor]:
        """``[B, N]`` float32 each: the sum and the largest of what text rows pay to each visual token, head mean."""
        sums = torch.zeros(seen.columns.shape, device=seen.columns.device)
        largest = sums
        for _, paid in attention_maps(seen, seen.rows, "mean"):
            sums, largest = sums + paid.sum(1), torch.maximum(largest, paid.amax(1))
        return sums, largest

    def _keys(self, ctx: TokenContext) -> Tensor:
        """``[B, N]`` bool: which of the entering tokens are key tokens."""
        crops = crops_of(ctx, unpruned=True)
        if not crops.tokens or self.key_share == 0:
            return torch.zeros_like(ctx.mask)
        attended = vision_of(ctx, self.vision_layer, crops).received()
        counts = tuple(ceil(self.key_share * n - 1e-9) for n in crops.tokens)
        there = crops.padding(ctx.device)
        absent = None if there is None else torch.where(there, 0, 2).to(torch.int8)
        wanted = whole_numbers(counts, ctx.device)
        best = ops.select_topk(attended, wanted, code=absent)[0][:, : max(counts)]
        chosen = crops.spread(marks(best, attended.shape[1]).float()) > 0
        return ctx.mask & chosen.gather(1, ctx.ordinals.clamp(min=0))
