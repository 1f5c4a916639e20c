"""VisionZip: keep the patches CLS attends to, and fold all others into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.errors import check
from vlmprune.policies.base import Needs, Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.by_image import gathered, nearest, quota_of, rows_at, vision_of
from vlmprune.policies.checks import check_flag, check_keep, check_share, check_whole, share_of
from vlmprune.policies.choose import others
from vlmprune.policies.counts import keep_count
from vlmprune.policies.crops import crops_of
from vlmprune.policies.groups import Kind

PRESETS = {192: (162, 30), 128: (108, 20), 64: (54, 10), 32: (27, 5)}
"""Published budgets as (dominant, contextual); 32 is the one per crop of LLaVA-NeXT at 160 tokens."""


@dataclass(frozen=True)
class VisionZip(PruningPolicy):
    """Keeps the dominant patches of every image and merges the rest into contextual ones.

    Both budgets of an image are shared out evenly over its crops (tiles, small view, a video's frames), each of which is reduced
    by itself, as released for LLaVA-NeXT; newline tokens go. Where a token is a mix of patches, so are its features and key.

    Dominant are the patches with the most CLS attention (its sum over heads ranks as its mean). Of the rest, in raster
    order, every ``step``-th is a target, ``step`` their number divided by ``contextual`` and rounded down; each other one
    goes to the target whose key, averaged over heads, is most cosine-similar. A contextual token is its target plus the
    mean of what went to it, in the tower's features; the projector then sees the result, as in the released code.

    Args:
        dominant: tokens of every image kept as they are, a number (int) or a share (float); 54 if neither this nor
            ``tokens`` is given.
        contextual: merged tokens of every image, a number if ``dominant`` is one and a share if it is one; 10 if neither
            this nor ``tokens`` is given.
        tokens: instead of the two: a published budget, 192 (162 + 30), 128 (108 + 20), 64 (54 + 10) or 32 (27 + 5).
        count_cls: the authors' settings count CLS among the dominant tokens and feed its row to the language model, which
            has no place for it here. True keeps the patches they keep: one fewer than ``dominant``, a number.
        vision_layer: vision-tower layer whose attention and keys are read.
        positions: ``"keep"``: in raster order at their own positions, contextual ones at their target's; or ``"pack"``
            (released code: dominant tokens, then contextual ones, at 0, 1, 2, ...).

    Raises:
        ValueError: a setting is out of range, or ``tokens`` contradicts the other two.
    """

    summary = "patches most attended by CLS, the rest merged into contextual tokens"
    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models (CVPR 2025), arXiv 2412.04467"
    formula = (
        "s_j = mean_h V[vision_layer][h, CLS, j];  y_j = mean_h u_j[vision_layer][h]\n"
        "in every crop keep the k(dominant) highest s_j\n"
        "of the m = n - k(dominant) others every ⌊m / c⌋-th is target i, c = k(contextual) of them\n"
        "every other j goes to the i of highest cos(y_i, y_j)\n"
        "keep every i with x_i ← project(v_i + mean of the v_j that went to it)"
    )
    presets = {
        192: "tokens=192,positions=pack",
        128: "tokens=128,positions=pack",
        64: "tokens=64,positions=pack",
        640: "dominant=540,contextual=100,positions=pack",  # of five crops: 108 + 20 each
        320: "dominant=270,contextual=50,positions=pack",  # 54 + 10
        160: "dominant=135,contextual=25,positions=pack",  # 27 + 5
        0.333: "dominant=0.281,contextual=0.052",
        0.222: "dominant=0.1873,contextual=0.0347",
        0.111: "dominant=0.0937,contextual=0.0173",
    }
    growth = "n^2"  # every merged token is compared with every contextual one

    dominant: int | float | None = None
    contextual: int | float | None = None
    tokens: int | None = None
    count_cls: bool = False
    vision_layer: int = -2
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        known = self.tokens is None or (type(self.tokens) is int and self.tokens in PRESETS)
        check(known, "tokens", f"one of {', '.join(map(str, PRESETS))}", repr(self.tokens))
        preset = PRESETS[self.tokens or 64]
        for name, value in zip(("dominant", "contextual"), preset, strict=True):
            given = getattr(self, name)
            agrees = self.tokens is None or given in (None, value)
            check(agrees, name, f"{value} with tokens={self.tokens}", repr(given))
            object.__setattr__(self, name, value if given is None else given)
        check_flag("count_cls", self.count_cls)
        check_whole("vision_layer", self.vision_layer)
        if not isinstance(self.dominant, float):
            check_whole("dominant", self.dominant, 1 + self.count_cls)
            check_whole("contextual", self.contextual, 0)
            return
        check_keep(self.dominant, "dominant")
        check_share("contextual", self.contextual)
        share = sum(self._both())
        check(share <= 1 + 1e-9, "contextual", "shares that add up to 1.0 at most", share)
        check(not self.count_cls, "count_cls", "False with shares", True)

    layers = (0,)  # before the language model
    spend = "crop"

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True, vision=(self.vision_layer,))

    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        crops = crops_of(ctx)
        if not crops.tokens:
            return ctx.ordinals
        hidden = crops.split(ctx.given("hidden"))
        features = ctx.given("features")
        seen, quota = vision_of(ctx, self.vision_layer, crops), quota_of(ctx, self, crops)
        scores, keys = seen.received(), seen.per_token(seen.key[:, :, int(seen.cls) :].float().mean(1))
        firsts = crops.shared_out([self._counts(n)[0] for own in ctx.images() for n in own]).kept
        picked, rows, into = [], [], []
        for kind in crops.kinds(quota, firsts):
            own = [crops.take(x, kind) for x in (scores, features, keys, hidden)]
            chosen, made, merged = self._zipped(ctx, kind, firsts[kind.members[0]], *own)
            picked.append((kind, chosen))
            rows.append((kind, made))
            into.append((kind, merged))
        made, merged = crops.together(rows), crops.together(into)
        return gathered(ctx, crops, quota, crops.together(picked), self.positions, made, merged)

    def _zipped(
        self,
        ctx: TokenContext,
        kind: Kind,
        first: int,
        scores: Tensor,
        features: Tensor,
        keys: Tensor,
        hidden: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of crops alike: the places ``[i, k]`` of dominant and contextual tokens, their rows ``[i, k, D]``, and into which
        place every token was merged, ``[i, T]``, -1 = into none.
        """
        project = ctx.given("project")
        dominant, _ = ops.select_topk(scores, first)
        left = others(dominant, scores.shape[1])
        targets, merged, into = merge_rest(features, keys, left, kind.kept - first)
        picked = torch.cat([dominant, targets], 1)
        rows = torch.cat([rows_at(hidden, dominant), project(merged).to(hidden.dtype)], 1)
        if self.positions == "keep":
            picked, order = picked.sort(dim=1)
            rows = rows_at(rows, order)
        return picked, rows, into

    def at(self, share: float) -> Self:
        """``share`` as both, in the proportion that they have."""
        share, (dominant, contextual) = share_of(share), self._both()
        merged = share * contextual / (dominant + contextual)
        return replace(self, dominant=share - merged, contextual=merged, tokens=None, count_cls=False)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return round(images * sum(self._counts(round(tokens / images)))) if tokens else 0

    def _counts(self, tokens: int) -> tuple[int, int]:
        """How many of an image's tokens are dominant, and into how many the others are merged."""
        dominant, contextual = self._both()
        if isinstance(dominant, float):
            both = keep_count(dominant + contextual, tokens)
            merged = min(int(contextual * tokens + 1e-6), both - 1)
            return both - merged, merged
        first = min(tokens, int(dominant) - self.count_cls)
        return first, min(int(contextual), tokens - first)

    def _both(self) -> tuple[float, float]:
        assert self.dominant is not None and self.contextual is not None
        return self.dominant, self.contextual


def merge_rest(
    features: Tensor, keys: Tensor, rest: Tensor, contextual: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets ``[I, C]`` strided over ``rest [I, R]``; their features ``[I, C, Dv]``, the rest of the rest merged in.

    And into which place every token was merged, ``[I, P]``, -1 = into none.
    """
    R = rest.shape[1]
    C, into = min(contextual, R), torch.full(keys.shape[:2], -1, dtype=torch.int64, device=rest.device)
    if C == 0:
        return rest[:, :0], features[:, :0], into
    strided = list(range(0, R, R // C))[:C]
    followers = sorted(set(range(R)) - set(strided))
    chosen, merging = (rest[:, whole_numbers(tuple(at), rest.device)] for at in (strided, followers))
    assigned = nearest(rows_at(keys, merging), rows_at(keys, chosen))
    mean = ops.merge_tokens(rows_at(features, merging), assigned, C, mode="mean")
    return chosen, rows_at(features, chosen) + mean, into.scatter(1, merging, chosen.gather(1, assigned))
