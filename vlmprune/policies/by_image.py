"""The batch seen image by image, or crop by crop: budgets spent so, vision attention, nearest rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.errors import check, require
from vlmprune.policies.base import Positions, PruningPolicy, Ranking, TokenContext, VisionAttention, outcome
from vlmprune.policies.choose import best_among, marks, padding, quotas
from vlmprune.policies.chosen import Reduction
from vlmprune.policies.crops import crops_of, images_of
from vlmprune.policies.groups import Counts, Groups, Quota
from vlmprune.policies.inputs import Rating


def budgets_of(ctx: TokenContext, policy: PruningPolicy) -> Counts:
    """How many tokens the policy keeps of each of the I images and videos of the batch."""
    return tuple(policy.kept(n, 1, ctx.layer) for own in ctx.images() for n in own)


def quota_of(ctx: TokenContext, policy: PruningPolicy, groups: Groups) -> Quota:
    """How many tokens of each group stay: what the policy keeps of an image, shared out evenly over its crops."""
    return groups.shared_out(budgets_of(ctx, policy))


def spent(
    ctx: TokenContext,
    policy: PruningPolicy,
    choose: Callable[..., Tensor],
    *tensors: Tensor,
    positions: Positions = "keep",
) -> Tensor | Reduction:
    """What ``choose`` takes by the policy's counts from every prompt, from every image of it, or from every crop.

    Args:
        ctx: the stage's context.
        policy: whose ``kept`` counts, and whose ``spends`` says of what.
        choose: ``choose_greedily`` of a rule, or alike: ``(counts, mask or None, *tensors)`` to places ``[G, k]``, ascending.
        tensors: ``[B, N, ...]``, what to choose by.
        positions: of the tokens that stay. Packed they stand crop by crop.

    Raises:
        InputError: by image or crop, where images are not whole: after an earlier stage, or in prefill by chunks.

    Example:
        >>> from functools import partial
        >>> from vlmprune.policies import Random
        >>> from vlmprune.policies.choose import choose_greedily
        >>> farthest, line = partial(choose_greedily, "maxmin"), torch.tensor([[3.0, 1], [1, 1], [1, 2], [1, 4]])
        >>> features = line.repeat(2, 1).expand(2, 8, 2)
        >>> [spent(ctx, Random(keep=1, spend=by), farthest, features)[1] for by in ("image", "prompt")]
        [tensor([0, 4]), tensor([0, 3])]
    """
    spend = policy.spends(ctx.layer)
    if spend == "prompt":
        index = choose(quotas(ctx, policy), padding(ctx.counts, ctx.mask), *tensors)
        return outcome(index, positions)
    groups = _groups(ctx, spend)
    if not groups.crops:
        return outcome(ctx.ordinals, positions)
    quota = quota_of(ctx, policy, groups)
    places = choose(list(quota.kept), groups.padding(ctx.device), *map(groups.split, tensors))
    return gathered(ctx, groups, quota, places, positions)


def gathered(
    ctx: TokenContext,
    groups: Groups,
    quota: Quota,
    picked: Tensor,
    positions: Positions,
    rows: Tensor | None = None,
    merged: Tensor | None = None,
) -> Tensor | Reduction:
    """The choice of places ``picked [I, k]`` within each group, perhaps with new ``rows [I, k, D]``.

    ``merged [I, T]`` says into which place of its group each token was merged, -1 = into none. What stays
    stands group by group where positions are packed, in raster order where they are kept.
    """
    index, made = groups.index(picked, quota), None
    if rows is not None:
        made = groups.join(rows, quota)
        if any(quota.rest):
            own = ops.gather_tokens([ctx.given("hidden")], index)[0]
            made = torch.where((groups.numbers(rows.shape[1], quota, ctx.device) < 0)[..., None], own, made)
    if positions == "keep" and not groups.in_line:
        last = ctx.mask.shape[1]
        index, order = torch.where(index < 0, last, index).sort(dim=1)
        index = index.masked_fill(index == last, -1)
        made = None if made is None else made.gather(1, order[..., None].expand_as(made))
    if merged is None:
        return outcome(index, positions, made)
    return Reduction(index, made, positions, merged=groups.spread(groups.places(merged), fill=-1))


def ranked(
    ctx: TokenContext,
    policy: PruningPolicy,
    scores: Tensor | Rating,
    positions: Positions = "keep",
    static: bool = False,
) -> Ranking:
    """The best by the policy's counts from every prompt or, where it spends so, from every image or crop of it.

    ``static`` is the ranking's: True if no tensor has been looked at for ``scores``, and none made.

    Raises:
        InputError: by image or crop, where images are not whole: after an earlier stage, or in prefill by chunks.

    Example:
        >>> from vlmprune.policies import Random
        >>> best = torch.arange(8.0).expand(2, 8)
        >>> [ranked(ctx, Random(keep=1, spend=by), best).index(ctx)[1] for by in ("image", "prompt")]
        [tensor([3, 7]), tensor([6, 7])]
    """
    spend = policy.spends(ctx.layer)
    if spend == "prompt":
        return Ranking(scores, tuple(quotas(ctx, policy)), positions=positions, static=static)
    groups = _groups(ctx, spend)
    quota = quota_of(ctx, policy, groups)
    if groups.in_line:
        sizes, keep = (groups.by_sample(n) for n in (groups.tokens, quota.kept))
        return Ranking(scores, keep, sizes, positions=positions, static=static)
    return _chosen(ctx, groups, quota, scores.scores() if isinstance(scores, Rating) else scores, positions)


def _chosen(ctx: TokenContext, groups: Groups, quota: Quota, scores: Tensor, positions: Positions) -> Ranking:
    """The best of every group, where groups lie in one another's rows: what is chosen has score 1, all else 0."""

    def behind(last: Tensor) -> Ranking:
        return _chosen(ctx, groups, quota, scores.masked_fill(last, -torch.inf), positions)

    best = best_of_each(groups, groups.split(scores), quota.kept)
    chosen = marks(groups.index(best, quota), ctx.mask.shape[1]).float()
    keep = tuple(map(sum, groups.by_sample(quota.kept, quota.rest)))
    return Ranking(chosen, keep, positions=positions, again=behind)


def best_of_each(groups: Groups, scores: Tensor, counts: Counts) -> Tensor:
    """Places ``[I, k]`` of the ``counts[i]`` best of each group by ``scores [I, T]``, ascending, -1 on the right."""
    wanted = whole_numbers(counts, scores.device)
    return best_among(scores, wanted, groups.padding(scores.device))[:, : max(counts)]


def _groups(ctx: TokenContext, spend: str) -> Groups:
    check(ctx.whole, "spend", "'prompt' after an earlier stage, or in prefill by chunks", repr(spend))
    return crops_of(ctx) if spend == "crop" else images_of(ctx)


def vision_of(ctx: TokenContext, layer: int, crops: Groups) -> VisionAttention:
    """One vision layer's query and key, or an error that says what the policy forgot to declare."""
    name = f"ctx.vision[{layer}]"
    seen = require(ctx.vision.get(layer), name, f"query and key (declare Needs(vision=({layer},)))")
    got = (seen.key.shape[0], seen.key.shape[2] - seen.cls) if seen.cells is None else seen.cells.shape[:2]
    wanted = (len(crops.tokens), max(crops.tokens))
    check(tuple(got) == wanted, name, "{} crops of up to {} tokens".format(*wanted), "{} of {}".format(*got))
    return seen


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [I, k]`` (no padding) of ``x [I, P, D]``: ``[I, k, D]``."""
    if len(x) == 1:  # the same, which a CPU does ten times faster
        return x.index_select(1, index[0])
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def nearest(rows: Tensor, targets: Tensor) -> Tensor:
    """Number ``[I, R]`` of the target ``[I, T, D]`` most cosine-similar to each row ``[I, R, D]``; ties to the first."""
    cosine = normalize(rows.float(), dim=-1) @ normalize(targets.float(), dim=-1).transpose(1, 2)
    return cosine.argmax(-1)
