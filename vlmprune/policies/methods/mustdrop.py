"""MustDrop: a key set of every image stays, and of the rest what the text attends to, in sum or by a single word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Ranking, Reduction, TokenContext, outcome
from vlmprune.policies.budgets import each
from vlmprune.policies.checks import BEFORE, check_layers, check_number, check_share, share_of
from vlmprune.policies.choose import falling_places, index_of, quotas
from vlmprune.policies.parts.attention_maps import below_both, over_thresholds
from vlmprune.policies.parts.raters import rated
from vlmprune.policies.parts.received import key_tokens
from vlmprune.policies.parts.stage_settings import check_each_stage, kept_at


@dataclass(frozen=True)
class MustDrop(PruningPolicy):
    """At every stage a token goes to which all text and every single text token pay little attention, unless it is a key token.

    Attention is that of the layer before, of all text rows behind the last image, softmax over the whole row, head mean. A
    token goes if its sum over the rows is below ``global_thr`` of what all visual tokens get and the largest of a row below
    ``individual_thr``. The ``ceil(key_share P)`` key tokens of every crop's P, those with the most CLS attention in a vision
    layer (head mean; without CLS the mean attention received), never go. How many stay depends on the data, and is read back
    at every stage. With ``keep`` it is known ahead: the tokens of the highest ``max(sum / (global_thr total), largest /
    individual_thr)`` stay, key tokens before all others, which are the same ones where the thresholds keep as many.

    A reading: its first step, which behind the first of CLIP's layers makes one token of every 3 x 3 window of a mean cosine
    of at least 0.8, is left out: nothing is known of these states behind the tower. So the tower and the layers before the
    first stage see every token, and key tokens are a share of these. Its last step, the cache of the layers between the
    stages cut to what stays at last, is ``earlier_kv="compact"``, which cuts the first layers too. The release is for one
    image behind one text. Not in the paper: without text behind its image a sample keeps everything by the thresholds (as
    the released comparison would have it), by ``keep`` its key tokens and others spread evenly.

    Args:
        layers: the stages, ascending: those behind the released 2, 6, 10 and 14.
        global_thr, individual_thr: share of the attention of all visual tokens (global), and attention of one row, above 0.
            Released: 0.001 and 0.001 for 192 tokens on average, 0.0012 and 0.001 for 128, 0.011 and 0.01 for 64.
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
    presets = each(
        "keep={}",
        counts=",positions=pack",
        of={192: 0.628, 128: 0.479, 64: 0.118, 640: 0.4762, 320: 0.121, 0.333: 0.5973, 0.222: 0.4296},
    )
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
        check_each_stage("keep", self.keep, self.layers)
        check_share("key_share", self.key_share)

    def needs(self, layer: int) -> Needs:
        return Needs(attention="previous", rows="text", vision=(self.vision_layer,))

    @property
    def fixed_count(self) -> bool:
        return self.keep is not None

    def at(self, share: float) -> Self:
        return replace(self, keep=share_of(share))

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return kept_at(self.keep, self.layers, layer, tokens, images)

    def ranks(self, layer: int) -> bool:
        return super().ranks(layer) and self.keep is not None

    def rank(self, ctx: TokenContext) -> Ranking:
        scores = over_thresholds(ctx.given("attention"), self.global_thr, self.individual_thr)
        place = falling_places(rated(scores, ctx), ctx.mask)
        first = key_tokens(ctx, self.vision_layer, self.key_share) * place.shape[1]
        return Ranking((first - place).float(), tuple(quotas(ctx, self)), positions=self.positions)

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        if self.keep is not None:
            return super().select(ctx)
        goes = below_both(ctx.given("attention"), self.global_thr, self.individual_thr)
        stays = ctx.mask & (~goes | key_tokens(ctx, self.vision_layer, self.key_share))
        stays[:, :1] |= ctx.mask[:, :1] & ~stays.any(1, keepdim=True)  # one stays in any case
        return outcome(index_of(stays), self.positions)
