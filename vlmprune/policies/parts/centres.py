"""Tokens kept as they are, and of the others those that the text speaks of as centres, into which the rest is merged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.policies.base import Positions, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.by_image import quota_of, rows_at
from vlmprune.policies.choose import best_among, marks, others
from vlmprune.policies.groups import Groups, Kind
from vlmprune.policies.parts.merging import kept_and_made
from vlmprune.policies.parts.relevance import text_directions, text_similarity


def keep_and_merge(
    ctx: TokenContext,
    policy: PruningPolicy,
    crops: Groups,
    worth: Callable[[Kind], Tensor],
    share: float,
    rounds: int,
    positions: Positions,
) -> Tensor | Reduction:
    """Keep the best tokens of every crop, and merge all others into those of highest mean cosine with the text's tokens.

    Args:
        ctx: the stage's context.
        policy: whose ``kept`` counts.
        crops: those of the context.
        worth: what the tokens of the crops of one kind are worth, ``[i, T]``; ties go to the lower place, NaN is least.
        share: of the tokens that stay, how many are centres, rounded down; one other stays at least.
        rounds: how often the rest joins them: ``join_centres``.
        positions: "pack" (centres stand behind what was kept) or "keep".
    """
    features, quota = ctx.given("features"), quota_of(ctx, policy, crops)
    speaks = crops.split(text_similarity(ctx)) if share > 0 else None

    def merged(kind: Kind, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        order = worth(kind).nan_to_num(float("-inf")).argsort(dim=1, descending=True, stable=True)
        count = min(int(kind.kept * share + 1e-6), max(kind.kept - 1, 0))
        chosen = order[:, : kind.kept - count].sort(dim=1).values
        if not count or speaks is None:
            return chosen, chosen[:, :0], own[:, :0], torch.full_like(order, -1)
        left = ~marks(chosen, own.shape[1])
        centres = best_among(crops.take(speaks, kind), count, left)[:, :count]
        of = whole_numbers(tuple(crops.samples[group] for group in kind.members), ctx.device)
        rest = others(torch.cat([chosen, centres], 1), own.shape[1])
        words, project = text_directions(ctx)[of], ctx.given("project")
        made, into = join_centres(own, crops.take(features, kind), centres, rest, words, project, rounds)
        return chosen, centres, made, into

    return kept_and_made(ctx, crops, quota, positions, merged)


def join_centres(
    own: Tensor,
    features: Tensor,
    centres: Tensor,
    rest: Tensor,
    words: Tensor,
    project: Callable[[Tensor], Tensor],
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """Each token of the rest joins a centre, the one of the highest sum over the words of both cosines; no host reads.

    A centre gains the mean of the features of what joins it, and is projected anew. So it goes ``rounds`` times, of the rest
    as it was and of the centres as they have become. Without words a token joins the centre of the highest cosine.

    Args:
        own: ``[i, T, D]`` projected rows of i crops.
        features: ``[i, T, Dv]`` of the tower.
        centres: ``[i, r]`` int64, their places; one at least.
        rest: ``[i, R]`` int64, the places of what is merged.
        words: ``[i, W, D]`` float32 unit vectors, zeros at padding.
        project: the projector.
        rounds: how often.

    Returns:
        The centres' rows ``[i, r, D]``, and into which place each token was merged, ``[i, T]`` int64, -1 = into none.
    """
    into = torch.full(own.shape[:2], -1, dtype=torch.int64, device=own.device)
    made = rows_at(own, centres)
    if rest.shape[1] == 0:
        return made, into
    worded = (words != 0).any(2).any(1)[:, None, None]
    features = features.float()
    moved, merging = rows_at(features, centres), rows_at(features, rest)
    unit = normalize(rows_at(own, rest).float(), dim=-1)
    heard = unit @ words.mT
    for _ in range(rounds):
        towards = normalize(made.float(), dim=-1)
        likeness = torch.where(worded, heard @ (towards @ words.mT).mT, unit @ towards.mT)
        joins = likeness.argmax(2)
        moved = moved + ops.merge_tokens(merging.contiguous(), joins, centres.shape[1])
        made = project(moved)
    return made.to(own.dtype), into.scatter(1, rest, centres.gather(1, joins))
