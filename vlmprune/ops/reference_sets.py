"""What the ops on sets of tokens compute, in plain PyTorch: greedy selection, density-peak clusters, matching, merging.

Read this first: it is the specification of their kernels, as ``reference`` is of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from vlmprune.ops.reference import select_topk

MIN_NORM, MAX_NORM = 1e-15, 1e15
"""Tokens outside, or of norm NaN, have no direction: beyond, products of their entries leave the range of float32."""

RANK_TOLERANCE = 1e-5
"""A DPP residual this small, against its own diagonal, is rounding: the token adds nothing to the chosen ones."""

Rule = Generator[Tensor, Tensor, None]
"""Yields the value ``[B, N]`` of choosing each token next, -inf where it cannot be chosen, and is sent the choice ``[B]``."""


def _real(features: Tensor, mask: Tensor | None) -> Tensor:
    """``mask``, or that all tokens are real ``[B, N]``."""
    return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask


def cosine(features: Tensor, mask: Tensor | None) -> Tensor:
    """Cosines ``[B, N, N]`` float32 in [-1, 1], 1 on the diagonal; 0 for padding and tokens of no direction."""
    x = features.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    ok = (norm > MIN_NORM) & (norm < MAX_NORM)
    ok = ok if mask is None else ok & mask[..., None]
    unit = (x / norm).masked_fill_(~ok, 0.0)
    cos = (unit @ unit.mT).clamp_(-1, 1)
    cos = (cos + cos.mT).div_(2)  # two tokens nearest to each other must tie to the last bit
    cos.diagonal(dim1=1, dim2=2).copy_(ok[..., 0])
    return cos


def _row(matrix: Tensor, best: Tensor) -> Tensor:
    """Row ``best [B]`` of each matrix ``[B, N, N]``."""
    if len(best) == 1:
        return matrix[0].index_select(0, best)
    return matrix.gather(1, best[:, None, None].expand(-1, 1, matrix.shape[2]))[:, 0]


def _column(matrix: Tensor, best: Tensor) -> Tensor:
    """Column ``best [B]`` of each matrix ``[B, M, N]``, as ``[B, 1, M]``."""
    if len(best) == 1:
        return matrix.index_select(2, best).mT
    return matrix.gather(2, best[:, None, None].expand(-1, matrix.shape[1], 1)).mT


def first_best(values: Tensor) -> Tensor:
    """Position ``[B]`` of the largest value of each row; ties go to the lower position."""
    positions = torch.arange(values.shape[1], device=values.device)
    top = values.amax(1, keepdim=True)
    return torch.where(values == top, positions, values.shape[1] - 1).amin(1)


def _maxmin(cos: Tensor, real: Tensor, relevance: Tensor | None, threshold: float) -> Rule:
    """Distance to the nearest chosen token; for the first choice, to the nearest other token."""
    apart = cos.neg_().add_(1)  # in place: new memory costs a CPU more than the sums
    own = apart.diagonal(dim1=1, dim2=2)
    own.fill_(float("inf"))
    apart.masked_fill_(~real[:, None, :], float("inf"))
    best = yield apart.amin(2).masked_fill(~real, float("-inf"))
    own.fill_(float("-inf"))  # which is the distance that every chosen token has from then on
    gap = _row(apart, best).masked_fill(~real, float("-inf"))
    while True:
        best = yield gap
        torch.minimum(gap, _row(apart, best), out=gap)


def _dpp(cos: Tensor, real: Tensor, relevance: Tensor | None, threshold: float) -> Rule:
    """Squared Cholesky residual of the kernel relevance_i cos_ij relevance_j (greedy MAP of Chen et al. 2018)."""
    assert relevance is not None
    r = relevance.float().nan_to_num(0.0, 0.0, 0.0)
    residual = (r * r * cos.diagonal(dim1=1, dim2=2))[:, None]
    least = RANK_TOLERANCE * residual
    kernel, factor = (r[:, :, None] * r[:, None, :]).mul_(cos), torch.empty_like(cos)
    spent = torch.where(real, 0.0, float("-inf"))[:, None]  # what a token is worth to which nothing is left
    for step in range(
        cos.shape[1]
    ):  # all of one row a sample, [B, 1, N]: views cost a CPU as much as the sums
        values = torch.where(residual > least, residual, spent)
        best = yield values[:, 0]
        at, above, row = best[:, None, None], factor[:, :step], factor[:, step : step + 1]
        spent.scatter_(2, at, float("-inf"))
        # nothing left: a row of zeros
        root = torch.threshold_(values.gather(2, at), 0.0, float("inf")).sqrt_()
        new = torch.baddbmm(_row(kernel, best)[:, None], _column(above, best), above, alpha=-1)
        torch.div(new, root, out=row)
        residual.addcmul_(row, row, value=-1)
    yield residual[:, 0]


def _coverage(cos: Tensor, real: Tensor, relevance: Tensor | None, threshold: float) -> Rule:
    """Relevance times the cosine by which all tokens would be better covered."""
    left = real.clone()
    r = torch.ones_like(real, dtype=torch.float32) if relevance is None else relevance.float()
    r = r.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    covered = torch.zeros_like(r)
    while True:
        gain = r * (cos - covered[:, None, :]).clamp(min=0).sum(2)
        best = yield gain.masked_fill(~left, float("-inf"))
        left.scatter_(1, best[:, None], False)
        covered = torch.maximum(covered, _row(cos, best))


def _nms(cos: Tensor, real: Tensor, relevance: Tensor | None, threshold: float) -> Rule:
    """Place in the order of relevance; every token too close to a chosen one stands behind all that are not."""
    assert relevance is not None
    N, left = relevance.shape[1], real.clone()
    r = relevance.float().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    place = r.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    close = torch.zeros_like(real)
    while True:
        best = yield (torch.where(close, N, 2 * N) - place).float().masked_fill(~left, float("-inf"))
        left.scatter_(1, best[:, None], False)
        close = close | (_row(cos, best) > threshold)


RULES: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Rule]] = {
    "maxmin": _maxmin,
    "dpp": _dpp,
    "coverage": _coverage,
    "nms": _nms,
}


def greedy_select(
    features: Tensor, keep: int, rule: str, relevance: Tensor | None, threshold: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chosen positions ascending, and in the order of choice: both ``[B, keep]``, -1 on the right."""
    (B, N, _), real = features.shape, _real(features, mask)
    if B * N * keep == 0:
        order = torch.full((B, keep), -1, dtype=torch.int64, device=features.device)
        return order.clone(), order
    steps = RULES[rule](cosine(features, mask), real, relevance, threshold)
    values, chosen = next(steps), list[Tensor]()
    for _ in range(keep):
        chosen.append(values.argmax(1))  # of equal values the first
        values = steps.send(chosen[-1])
    here = torch.arange(keep, device=features.device) < real.sum(1, keepdim=True)
    order = torch.where(here, torch.stack(chosen, 1), -1)
    index = order.masked_fill(order < 0, N).sort(dim=1).values
    return index.masked_fill(index == N, -1), order


def _distances(x: Tensor) -> Tensor:
    """L2 between all pairs ``[B, N, N]`` of ``x [B, N, D]`` float32, from differences: exactly 0 between doubles.

    ``torch.pdist`` takes each pair once; ``torch.cdist`` is exact at sixteen times the time on a CPU.
    """
    B, N, _ = x.shape
    first, second = torch.triu_indices(N, N, 1, device=x.device)
    distance = x.new_zeros(B, N, N)
    for own, rows in zip(distance, x, strict=True):
        own[first, second] = torch.pdist(rows)
    return distance + distance.mT


def cluster_dpc(
    features: Tensor, clusters: int, neighbors: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cluster number of each token ``[B, N]``, -1 = padding; centres ``[B, clusters]`` best first, -1 = none."""
    B, N, D = features.shape
    real = _real(features, mask)
    if B * N * clusters == 0:
        none = torch.full_like(real, -1, dtype=torch.int64)
        return none, none.new_full((B, clusters), -1)
    pair = real[:, :, None] & real[:, None, :]
    x = features.float()
    distance = (_distances(x) / D**0.5).masked_fill_(~pair, float("inf"))

    k = real.sum(1, keepdim=True).clamp(1, neighbors)
    near = torch.arange(N, device=x.device) < k[:, :, None]
    spread = distance.sort(dim=2).values.square().masked_fill(~near, 0.0).sum(2) / k  # density = exp(-spread)
    at = torch.arange(N, device=x.device)
    tighter = spread[:, None, :] < spread[:, :, None]
    denser = tighter | ((spread[:, None, :] == spread[:, :, None]) & (at[None, :] < at[:, None]))
    denser = denser & pair
    farthest = distance.masked_fill(~pair, 0.0).amax((1, 2))
    gap = distance.masked_fill(~denser, float("inf")).amin(2)
    gap = torch.where(denser.any(2), gap, farthest[:, None])

    # the logarithm of density * gap: the same order, and far tokens do not all underflow to density 0
    score = (gap.log() - spread).clamp(min=torch.finfo(torch.float32).min).masked_fill(~real, float("-inf"))
    best = score.sort(dim=1, descending=True, stable=True)
    centers = torch.where(best.values > float("-inf"), best.indices, -1)[:, :clusters].contiguous()
    to_center = distance.gather(2, centers.clamp(min=0)[:, None, :].expand(-1, N, -1))
    to_center = to_center.masked_fill((centers < 0)[:, None, :], float("inf"))
    own = centers[:, None, :] == at[None, :, None]  # a centre belongs to itself, even beside its double
    nearest = first_best((-to_center.masked_fill(own, -1.0)).flatten(0, 1)).view(B, N)
    return nearest.masked_fill(~real, -1), centers


def match_bipartite(
    features: Tensor, r: int, destinations: Tensor | None, mask: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """Each token's place among the survivors ``[B, N]``, -1 = padding; the survivors' positions ``[B, width]``."""
    (B, N, _), device = features.shape, features.device
    here = torch.arange(N, device=device)
    at = here[1::2] if destinations is None else destinations
    at = torch.where((at >= 0) & (at < N), at, N).expand(B, -1)
    real = _real(features, mask)
    takes = _marks(at, N) & real
    gives = real & ~takes & takes.any(1, keepdim=True)
    if N == 0:
        return real.long(), real.new_empty((B, 0), dtype=torch.int64)

    cos = cosine(features, mask).masked_fill(~takes[:, None, :], float("-inf"))
    match = first_best(cos.flatten(0, 1)).view(B, N)
    best = select_topk(cos.amax(2), r, torch.where(gives, 0, 2), N)[0]
    merged = _marks(torch.where(best >= 0, best, N), N)
    stays = real & ~merged
    slot = (stays.cumsum(1) - 1).gather(1, torch.where(merged, match, here))
    index = torch.where(stays, here, N).sort(dim=1).values[:, :width]
    return slot.masked_fill(~real, -1), index.masked_fill(index == N, -1)


def _marks(positions: Tensor, N: int) -> Tensor:
    """Bool ``[B, N]``: True at ``positions [B, n]``, of which N itself marks nothing."""
    marks = torch.zeros(positions.shape[0], N + 1, dtype=torch.bool, device=positions.device)
    return marks.scatter(1, positions, True)[:, :N]


def merge_tokens(
    features: Tensor, assignment: Tensor, clusters: int, mode: str, weights: Tensor | None
) -> Tensor:
    """Sum or mean ``[B, clusters, D]`` of the tokens of each cluster; a cluster of no weight has mean 0.

    On a GPU this adds in no fixed order; the kernel's order is fixed.
    """
    B, N, D = features.shape
    ok = (assignment >= 0) & (assignment < clusters)
    # one extra cluster takes the ignored
    first = torch.arange(B, device=features.device)[:, None] * (clusters + 1)
    at = (first + torch.where(ok, assignment, clusters)).flatten()
    w = torch.ones(B, N, 1, device=features.device) if weights is None else weights.float()[..., None]
    x = features.float() if weights is None else features.float() * w
    rows = torch.cat([x, w], dim=2).flatten(0, 1)
    sums = rows.new_zeros(B * (clusters + 1), D + 1).index_add(0, at, rows)
    sums = sums.view(B, clusters + 1, D + 1)[:, :clusters]
    total, merged = sums[..., D:], sums[..., :D]
    if mode == "mean":
        merged = torch.where(total != 0, merged / total, 0.0)
    return merged.to(features.dtype).contiguous()
