"""VisionTrim: keep the patches that CLS and their surroundings make dominant, and merge others by the text into a few more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import counting, whole_numbers
from vlmprune.errors import check
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext, VisionAttention
from vlmprune.policies.budgets import each
from vlmprune.policies.by_image import gathered, quota_of, rows_at, vision_of
from vlmprune.policies.checks import check_keep, check_share, check_whole, check_word
from vlmprune.policies.choose import marks, others
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Groups, Kind
from vlmprune.policies.parts.affinity import local_affinity
from vlmprune.policies.parts.relevance import text_directions, text_similarity


@dataclass(frozen=True)
class VisionTrim(PruningPolicy):
    """Keeps dominant patches as they are, and merges those of the rest that the text speaks of into a few.

    Dominant are the patches of the highest ``a softmax(CLS attention) + (1 - a) softmax(local affinity)``, where the less a
    term varies over the image the more it counts: ``a = var(local) / (var(CLS) + var(local))``. The affinity of a patch is
    how like those around it are, in features and place (``affinity.py``). Of the others, those whose mean cosine with the
    text's tokens is highest are centres; each one that is left joins the centre of the highest ``sum_t cos(i, t) cos(t,
    centre)``, and a centre gains the mean of what joins it. That runs ``rounds`` times, centres compared as they have
    become. All of it is of the tower's features; the projector then sees the result.

    A reading, as the sources disagree and LLaVA checkpoints have no text tower. The paper's score is the one above; its
    code computes it and overwrites it with ``score="received"``: half the CLS attention and half the mean attention from
    all other patches, each over its norm. In its affinity a place outside the image counts as a patch like this one, which
    favours edges; the paper's mean is over the neighbours. Of the merging the paper writes softmaxes and weights, the code
    has cosines and plain means: we follow the code. It compares in CLIP's embedding, by its text tower and visual
    projection; here projected rows and the input embeddings of the text after the last image stand in, as in CDPruner. With
    no text after the image, centres are the first of the others, and each is joined by those most like it. Beside the
    released functions on the same float32 tensors (36 to 576 patches) ``score="received"`` leaves the same rows in 112 of
    112 images, the affinity is equal to 3e-7 once edges are counted alike, and the combined score that they overwrite
    shares 85 to 98 % of its patches with ours.

    The paper also prunes within the language model; of that its code has a sketch, commented out, and gives no layer or
    budget: what is wanted there, ``Stages`` puts behind this.

    Args:
        keep: tokens per image (int) or share (float), shared out evenly over its crops (tiles, small view, frames), centres
            included; newline tokens go. Released: 64.
        text_ratio: share of them that are centres, in [0, 1], rounded down; one dominant patch stays at least. Released: 16
            of 64.
        score: ``"local"`` (the paper's) or ``"received"`` (what the released code goes by; the attention of all patches is
            made for it, 4 bytes for each two of them and each head).
        window: rows and columns of the places around a patch, an odd number, at least 1.
        rounds: how often what is left joins the centres, at least 1.
        vision_layer: vision-tower layer whose attention is read: the one whose output the projector gets.
        positions: ``"keep"``, a centre having its own; or ``"pack"`` (released code: dominant ones, then centres).
    """

    summary = "patches dominant by CLS and surroundings, others merged by the text into a few"
    paper = (
        "VisionTrim: Unified Vision Token Compression for Training-Free MLLM Acceleration (ICLR 2026), "
        "arXiv 2601.22674"
    )
    formula = (
        "g_j = softmax_j mean_h V[vision_layer][h, CLS, j];  p_j = softmax_j of -mean_i (d_ij² + b_ij² / 2),\n"
        "i around j, d_ij = |v_i - v_j| / std v, b_ij = the same of places  (window=3)\n"
        "s_j = a g_j + (1 - a) p_j, a = var p / (var g + var p);  r = ⌊text_ratio · k⌋  (score='local')\n"
        "in every crop keep the k - r highest s_j; of the others the r highest mean_t cos(x_j, e_t)\n"
        "rounds times: each i of the rest joins the one of these j of highest ∑_t cos(x_i, e_t) cos(e_t, x_j)\n"
        "v_j ← v_j + mean of the v_i that join j;  x_j ← project(v_j)"
    )
    checked = "reading"
    presets = each("keep={}", counts=",positions=pack")
    growth = "n^2"  # every merged token is compared with every centre

    keep: int | float = 64
    text_ratio: float = 0.25
    score: Literal["local", "received"] = "local"
    window: int = 3
    rounds: int = 3
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_share("text_ratio", self.text_ratio)
        check_word("score", self.score, "local", "received")
        check_whole("window", self.window, 1)
        check(self.window % 2 == 1, "window", "an odd number", self.window)
        check_whole("rounds", self.rounds, 1)
        check_whole("vision_layer", self.vision_layer)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        """The vision layer, projected rows, and the text's embeddings unless nothing is merged."""
        return Needs(hidden=True, embeds=self.text_ratio > 0, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        hidden = crops.split(ctx.given("hidden"))
        features = ctx.given("features")
        seen, quota = vision_of(ctx, self.vision_layer, crops), quota_of(ctx, self, crops)
        paid = [seen.received()] + ([from_others(seen)] if self.score == "received" else [])
        speaks = crops.split(text_similarity(ctx)) if self.text_ratio > 0 else None
        places, rows, into = [], [], []
        for kind in crops.kinds(quota):
            own, v = crops.take(hidden, kind), crops.take(features, kind)
            score = self._score([crops.take(x, kind) for x in paid], v, kind)
            centres = min(int(kind.kept * self.text_ratio + 1e-6), max(kind.kept - 1, 0))
            chosen, _ = ops.select_topk(score, kind.kept - centres)
            made, joined = rows_at(own, chosen), torch.full_like(score, -1, dtype=torch.int64)
            if centres and speaks is not None:
                found, new, joined = self._joined(ctx, crops, kind, chosen, crops.take(speaks, kind), own, v)
                chosen, made = torch.cat([chosen, found], 1), torch.cat([made, new], 1)
            if self.positions == "keep":
                chosen, order = chosen.sort(dim=1)
                made = rows_at(made, order)
            places.append((kind, chosen))
            rows.append((kind, made))
            into.append((kind, joined))
        together = [crops.together(parts) for parts in (places, rows, into)]
        return gathered(ctx, crops, quota, together[0], self.positions, *together[1:])

    def _score(self, paid: list[Tensor], features: Tensor, kind: Kind) -> Tensor:
        """How dominant each patch is, ``[i, T]`` float32: minus how many are more so, which rounds nothing off."""
        if self.score == "received":
            score = normalize(paid[0].double(), dim=1) + normalize(paid[1].double(), dim=1)
        else:
            affinity = local_affinity(features, (kind.crop.rows, kind.crop.columns), self.window)
            near, seen = affinity.softmax(1), paid[0].double().softmax(1)
            varies, other = (x.var(1, keepdim=True) if x.shape[1] > 1 else x * 0 for x in (near, seen))
            share = torch.where(varies + other > 0, varies / (varies + other), 0.5)
            score = share * seen + (1 - share) * near
        order = score.nan_to_num(float("-inf")).argsort(dim=1, descending=True, stable=True)
        return torch.empty_like(paid[0]).scatter_(
            1, order, -counting(1, order.shape[1], order.device).expand_as(order).float()
        )

    def _joined(
        self,
        ctx: TokenContext,
        crops: Groups,
        kind: Kind,
        dominant: Tensor,
        speaks: Tensor,
        own: Tensor,
        features: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The centres' places ``[i, r]``, their rows ``[i, r, D]``, and into which place each token was merged ``[i, T]``."""
        project = ctx.given("project")
        taken = marks(dominant, own.shape[1])
        count = kind.kept - dominant.shape[1]
        found = ops.select_topk(speaks, count, code=taken.to(torch.int8) * 2)[0][:, :count]
        rest = others(torch.cat([dominant, found], 1), own.shape[1])
        into = torch.full_like(taken, -1, dtype=torch.int64)
        if rest.shape[1] == 0:
            return found, rows_at(own, found), into
        of = whole_numbers(tuple(crops.samples[group] for group in kind.members), own.device)
        words = text_directions(ctx)[of]
        worded = (words != 0).any(2).any(1)[:, None, None]
        features = features.float()
        moved, centres, merging = rows_at(features, found), rows_at(own, found), rows_at(features, rest)
        unit = normalize(rows_at(own, rest).float(), dim=-1)
        heard = unit @ words.mT
        for _ in range(self.rounds):
            towards = normalize(centres.float(), dim=-1)
            likeness = torch.where(worded, heard @ (towards @ words.mT).mT, unit @ towards.mT)
            joins = likeness.argmax(2)
            moved = moved + ops.merge_tokens(merging.contiguous(), joins, count)
            centres = project(moved)
        return found, centres.to(own.dtype), into.scatter(1, rest, found.gather(1, joins))


def from_others(seen: VisionAttention) -> Tensor:
    """Attention ``[I, T]`` float32 that the patches of each token receive from all other patches, head mean, as a sum."""
    logits = seen.query.float() @ seen.key.float().mT * seen.scale
    if seen.mask is not None:
        logits = logits.masked_fill(~seen.mask[:, None, None], float("-inf"))
    paid = logits.softmax(3)[:, :, int(seen.cls) :, int(seen.cls) :].mean(1)
    itself = torch.eye(paid.shape[1], dtype=torch.bool, device=paid.device)
    paid = paid.masked_fill(itself, 0.0)
    if seen.mask is not None:
        paid = paid.masked_fill(~seen.mask[:, :, None], 0.0)
    return seen.per_token(paid.sum(1))
