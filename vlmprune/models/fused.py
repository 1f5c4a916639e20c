"""A stage as one fused pass: from the projections of the layer that scores to the rows that survive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.models.layout import Layout
from vlmprune.models.prefill import Decision, Entering
from vlmprune.policies.base import PruningPolicy, Ranking
from vlmprune.policies.inputs import Rating

Counts = tuple[int, ...]


def why_not(ranking: Ranking | None, entering: Entering, policy: PruningPolicy) -> str | None:
    """Why a stage cannot run as one pass; None if it can."""
    if ranking is None:
        return f"{type(policy).__name__} selects by itself"
    if entering.predicting is not None:
        return "in training the rows that predict labels stay, whatever their score"
    if entering.layout.end is not None:
        return "candidates of assisted decoding stand behind the prompt"
    return None


def one_pass(ranking: Ranking, entering: Entering) -> tuple[Tensor, Tensor, Decision]:
    """Score, select and gather: rows ``[B, n, D]`` that survive, numbers ``[B, K]`` of the tokens kept, the decision."""
    layout, packs = entering.layout, ranking.positions == "pack"
    tensors = [entering.hidden] if packs else [entering.hidden, *(t.detach() for t in entering.rope)]
    if layout.origin is not None:
        tensors.append(layout.origin)
    kept = ranking.most(layout.counts)
    real = _rows_left(layout, kept)
    # Shorter samples are padded on the left, so that the last row stays the newest token.
    side = "left" if len(real) > 1 else "right"
    how = ranking.keywords(layout.counts, entering.hidden.device)
    out = _run(ranking, layout, tensors, {**how, "width": max(real), "padding": side, "newest": True})
    if ranking.extra is not None:
        out, kept = _narrowed(out, layout, side)
        real = _rows_left(layout, kept)
    short, *rest = out.tensors
    full = min(real) == max(real)
    origin = out.index
    if layout.origin is not None:
        origin = rest.pop() if full else torch.where(out.index >= 0, rest.pop(), -1)
    after = Layout(
        length=max(real),
        visual=out.columns,
        counts=kept,
        real=real,
        valid=None if full else out.index >= 0,
        origin=origin,
        before=(layout, out.kept),
        ordered=layout.ordered,
    )
    rope, shift = entering.packed(after) if packs else ((rest[0], rest[1]), entering.shift)
    return short, out.kept, Decision(after, out.index, rope, shift)


def _rows_left(layout: Layout, kept: Counts) -> Counts:
    """Rows of each sample that are no padding, when so many of its visual tokens stay."""
    return tuple(r - c + k for r, c, k in zip(layout.real, layout.counts, kept, strict=True))


def _run(ranking: Ranking, layout: Layout, tensors: list[Tensor], how: dict[str, Any]) -> ops.Pruned:
    rating = ranking.scores
    if isinstance(rating, Rating) and rating.seen.group is None:
        return ops.prune_tokens(rating.seen.query, rating.seen.key, tensors, **how, **rating.keywords)
    scores = ranking.scored()  # of all ranks, where several share the heads
    return ops.prune_scored(scores, tensors, columns=layout.visual, key_mask=layout.valid, **how)


def _narrowed(out: ops.Pruned, layout: Layout, side: str) -> tuple[ops.Pruned, Counts]:
    """What a union really keeps, which only the device knows: one host read, and views of what was gathered."""
    left = out.count.tolist()
    kept = tuple(n - r + c for n, r, c in zip(left, layout.real, layout.counts, strict=True))
    spare, width = out.index.shape[1] - max(left), max(left)
    rows = slice(None, width) if side == "right" else slice(spare, None)
    columns = out.columns[:, : max(kept)]
    if side == "left" and spare:
        columns = torch.where(columns >= 0, columns - spare, -1)
    out = out._replace(
        tensors=[t[:, rows] for t in out.tensors],
        index=out.index[:, rows],
        kept=out.kept[:, : max(kept)],
        columns=columns,
    )
    return out, kept
