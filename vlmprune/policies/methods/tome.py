"""ToMe: merge a few of the patches most alike, again and again, until as many are left as shall stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import vision_of
from vlmprune.policies.checks import check_keep, check_whole
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.folding import Rounds, fold_crops
from vlmprune.policies.parts.tower_keys import mean_keys


@dataclass(frozen=True)
class ToMe(PruningPolicy):
    """Merges the tokens of every crop by bipartite soft matching in ``rounds`` equal steps, until ``keep`` are left.

    In every round each other token is a destination; the sources whose key, averaged over heads, is most like that of a
    destination merge into it, by means in which a token that stands for m counts m times. ToMe takes as many in each block
    of the tower, ours as many in each round: what goes, divided by ``rounds`` and rounded up, at most half of what is left.
    Sources are the second, fourth, ... patch of a tower with CLS, which stands ahead of them, and the first, third, ... of
    one without; so it is in ToMe.

    It is a reading, as it acts behind the tower: ToMe merges inside it, between attention and MLP of every block, so that
    the tower itself gets cheaper, later blocks see what was merged, and each block compares keys of its own. Here the tower
    runs whole, the keys are those of one layer, and a merged token has the mean of its parts' keys from one round to the
    next; merged are the tower's last features, which the projector then sees. ``rectify=True`` is its proportional
    attention (log m on the logits), in the language model, where ToMe has it in the tower. ToMe puts the sources that stay
    ahead of the destinations after a round, which changes who is one in the next; ours keep their order. Beside its
    functions on the same float32 tensors one round leaves the same rows, and so do 7 to 23 rounds where what they leave is
    put in raster order each time (159 of 160 sets of 195 to 576 tokens, a near tie the other); as they are, half the places
    differ.

    From FOLDER it differs by its many small rounds (FOLDER halves, which merges tokens far from alike as early as in the
    first round), and in that no attention of CLS holds a token back.

    Args:
        keep: tokens per image (int) or share (float), shared out evenly over its crops (tiles, small view, frames); newline
            tokens go.
        rounds: over how many rounds the merging is spread, at least 1; as many blocks as LLaVA-1.5's tower runs. With few, or a
            small ``keep``, halving takes more.
        vision_layer: vision-tower layer whose keys are compared: the one whose output the projector gets.
        positions: ``"keep"``, a merged token having its destination's, or ``"pack"``.
    """

    summary = "many small rounds that merge the patches most alike"
    paper = "Token Merging: Your ViT But Faster (ICLR 2023), arXiv 2210.09461"
    formula = (
        "rounds in every crop while m > k, m = tokens left: min(m - k, ⌈(n - k) / rounds⌉, ⌊m / 2⌋) merge\n"
        "y_j = mean_h u_j[vision_layer][h];  i at places 1, 3, …, j at 0, 2, … (with CLS)\n"
        "the i of highest max_j cos(y_i, y_j) merge into their nearest j\n"
        "y_j, v_j ← means weighted by how many tokens each is made of\n"
        "x_j ← project(v_j) where tokens have merged"
    )
    checked = "reading"
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^2"  # a round compares sources with destinations

    keep: int | float = 192
    rounds: int = 23
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_whole("rounds", self.rounds, 1)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        seen = vision_of(ctx, self.vision_layer, crops)
        keys = mean_keys(seen)
        rounds = Rounds(first=1 - seen.cls, weighted=True, least=self.rounds)
        return fold_crops(ctx, self, crops, rounds, self.positions, keys)
