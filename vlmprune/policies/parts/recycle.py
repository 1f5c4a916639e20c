"""SparseVLM's recycling: the best of the pruned tokens come back, merged by density-peak clusters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Ranking, Reduction, TokenContext
from vlmprune.policies.choose import best_among, marks

MOST = 1e15
"""Squares of larger numbers leave the range of float32, and with it the distances between tokens."""


def recycle_counts(pruned: int) -> tuple[int, int]:
    """How many of the pruned tokens are recycled, and how many tokens they become."""
    if pruned == 0:
        return 0, 0
    m = int(pruned * 0.3) + 1
    return m, int(m / 10) + 1


def recycled(ctx: TokenContext, ranking: Ranking, merge: str) -> Reduction:
    """What the ranking keeps and, after it, the best of the others, merged: "mean" or "sum"."""
    hidden = ctx.given("hidden")
    index, rows, merged = _recycled(ranking.scored(), hidden, ctx, ranking.least, merge)
    return Reduction(index, rows, ranking.positions, merged=merged)


def _recycled(
    scores: Tensor, hidden: Tensor, ctx: TokenContext, kept: Sequence[int], merge: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Places ``[B, K]`` of the kept tokens and, after them, of the merged ones; the contents of both ``[B, K, D]``; and into
    which place each token was merged, ``[B, N]``, -1 = into none.

    Samples that keep as many of as many go together: one round for a batch of equal images.
    """
    sizes = [(k, *recycle_counts(n - k)) for k, n in zip(kept, ctx.counts, strict=True)]
    if len(set(sizes)) == 1:
        return _thin(scores, hidden, ctx.mask, *sizes[0], merge)
    width = max(k + clusters for k, _, clusters in sizes)
    index = torch.full((len(sizes), width), -1, dtype=torch.int64, device=hidden.device)
    rows = hidden.new_zeros(len(sizes), width, hidden.shape[2])
    merged = torch.full(ctx.mask.shape, -1, dtype=torch.int64, device=hidden.device)
    for size in sorted(set(sizes)):
        at = whole_numbers(tuple(b for b, other in enumerate(sizes) if other == size), hidden.device)
        some, contents, merged[at] = _thin(scores[at], hidden[at], ctx.mask[at], *size, merge)
        index[at, : some.shape[1]], rows[at, : some.shape[1]] = some, contents
    return index, rows, merged


def _thin(
    scores: Tensor, hidden: Tensor, mask: Tensor, keep: int, pool: int, clusters: int, merge: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the best ``keep`` of each row; merge the ``pool`` next best into ``clusters`` tokens.

    Numbers out of range (an overflow, a broken image) are clustered as the nearest in range, NaN as 0.
    """
    best = best_among(scores, keep, mask)[:, :keep]
    merged = torch.full_like(mask, -1, dtype=torch.int64)
    if clusters == 0:
        return best, ops.gather_tokens([hidden], best)[0], merged
    spare = best_among(scores, pool, mask & ~marks(best, mask.shape[1]))[:, :pool]
    features = ops.gather_tokens([hidden], spare)[0]
    assignment, centers = ops.cluster_dpc(features.float().clamp(-MOST, MOST).nan_to_num(0.0), clusters)
    means = ops.merge_tokens(features, assignment, clusters, mode=merge)
    places = spare.gather(1, centers)
    index, rows = torch.cat([best, places], 1), torch.cat([ops.gather_tokens([hidden], best)[0], means], 1)
    return index, rows, merged.scatter_(1, spare, places.gather(1, assignment))
