"""Rounds of bipartite matching (ToMe) that merge the tokens of every crop until as many are left as shall stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.by_image import gathered, quota_of, rows_at
from vlmprune.policies.choose import marks, others
from vlmprune.policies.groups import Groups, Kind


class Rounds(NamedTuple):
    """How tokens that are alike are merged.

    Attributes:
        first: which token is the first destination, of which every other one follows: 1, as in ToMe, or 0, which is the
            same where a CLS row stands ahead of the tokens.
        spare: a round merges ``(n - spare) // 2`` of n tokens at most, but one of two.
        weighted: whether a token that stands for m counts m times in the next mean.
        least: over how many rounds what goes is spread evenly; halving may take more.
    """

    first: int = 1
    spare: int = 0
    weighted: bool = False
    least: int = 1


class Folded(NamedTuple):
    """What is left of I crops of T tokens.

    Attributes:
        places: ``[I, k]`` int64, where the tokens that stay stood, ascending.
        rows: ``[I, k, D]`` what they hold now.
        sizes: ``[I, k]`` float32, how many tokens each of them is made of.
        into: ``[I, T]`` int64, into which place every token was merged, -1 = it stayed.
    """

    places: Tensor
    rows: Tensor
    sizes: Tensor
    into: Tensor


def fold_crops(
    ctx: TokenContext,
    policy: PruningPolicy,
    crops: Groups,
    rounds: Rounds,
    positions: Positions,
    keys: Tensor | None = None,
    penalty: Tensor | None = None,
    finish: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor | Reduction:
    """Fold every crop to as many tokens as the policy keeps of it. What stays alone keeps its own hidden states.

    Args:
        crops: where the crops lie.
        rounds: how.
        positions: "pack" or "keep".
        keys: ``[I, T, ...]``: the tower's features are merged by these, and then projected; None = projected rows are
            compared and merged.
        penalty: ``[I, T]``, taken off the likeness of a source; None = nothing is.
        finish: merged projected rows ``[i, k, D]`` and their sizes ``[i, k]`` to hidden states; None = as they are.
    """
    quota = quota_of(ctx, policy, crops)
    hidden = crops.split(ctx.given("hidden"))
    if keys is not None:
        features = ctx.given("features")
        project = ctx.given("project")

    def folded(kind: Kind) -> tuple[Tensor, ...]:
        own = metric = rows = crops.take(hidden, kind)
        less = None if penalty is None else crops.take(penalty, kind)
        if keys is not None:
            metric, rows = crops.take(keys, kind), crops.take(features, kind)
        done = fold(metric, rows, kind.kept, rounds, less)
        new = done.rows if keys is None else project(done.rows)
        new = new if finish is None else finish(new, done.sizes)
        alone = (done.sizes == 1)[..., None]
        return done.places, torch.where(alone, rows_at(own, done.places), new.to(own.dtype)), done.into

    places, made, into = crops.by_kind(quota, folded)
    return gathered(ctx, crops, quota, places, positions, made, into)


def fold(metric: Tensor, rows: Tensor, keep: int, rounds: Rounds, penalty: Tensor | None = None) -> Folded:
    """Merge ``rows [I, T, Dv]`` by the cosines of ``metric [I, T, D]`` until ``keep`` of the T are left; no host reads.

    Each round splits what is left into sources and destinations by turns, and merges the sources most like their
    nearest destination into it: rows and metric become means, and a token stands where its destination stood. A source's
    ``penalty [I, T]`` is taken off that likeness, and is a plain mean itself from one round to the next. With ``keep`` 0 all go.
    """
    n, device = metric.shape[1], metric.device
    own = places = torch.arange(n, device=device).expand(metric.shape[:2])
    if keep == 0:  # of a crop of an image that keeps fewer tokens than it has crops
        return Folded(places[:, :0], rows[:, :0], metric.new_zeros(len(rows), 0), torch.full_like(places, -1))
    sizes = torch.ones(metric.shape[:2], device=device)
    same = rows is metric
    metric, rows = metric.contiguous(), rows.contiguous()  # a tower's rows may lie across one another
    most = -(-(n - keep) // rounds.least)
    while n > keep:
        r = min(n - keep, most, max(1, (n - rounds.spare) // 2))
        assignment, index = _matched(metric, r, rounds.first, penalty)
        n, weights = index.shape[1], sizes if rounds.weighted else None
        metric = ops.merge_tokens(metric, assignment, n, weights=weights)
        rows = metric if same else ops.merge_tokens(rows, assignment, n, weights=weights)
        sizes = ops.merge_tokens(sizes[..., None], assignment, n, mode="sum")[..., 0]
        if penalty is not None:
            penalty = ops.merge_tokens(penalty[..., None], assignment, n)[..., 0]
        own, places = assignment.gather(1, own), places.gather(1, index)
    into = places.gather(1, own)
    here = torch.arange(into.shape[1], device=device)
    return Folded(places, rows, sizes, torch.where(into == here, -1, into))


def _matched(metric: Tensor, r: int, first: int, penalty: Tensor | None) -> tuple[Tensor, Tensor]:
    """``ops.match_bipartite`` whose r sources are those most alike less the penalty."""
    n, device = metric.shape[1], metric.device
    at = None if first == 1 else whole_numbers(tuple(range(first, n, 2)), device)
    sources = (n + first) // 2
    if penalty is None or r == sources:
        return ops.match_bipartite(metric, r, destinations=at)
    assignment, index = ops.match_bipartite(metric, sources, destinations=at)
    match = index.gather(1, assignment)
    likeness = cosine_similarity(metric.float(), rows_at(metric, match).float(), dim=2) - penalty
    turns = whole_numbers(tuple(2 * (i % 2 == first) for i in range(n)), device).to(torch.int8)
    merging = ops.select_topk(likeness, r, code=turns.expand_as(match).contiguous())[0][:, :r]
    goes = marks(merging, n)
    slot = (~goes).cumsum(1) - 1
    here = torch.arange(n, device=device)
    return slot.gather(1, torch.where(goes, match, here)), others(merging, n)
