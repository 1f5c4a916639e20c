"""The same results by other means: plain PyTorch, the whole attention matrix, published code, other packages.

None of these functions waits for the device, so that each can be captured in a CUDA graph like our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune import ops

from .inputs import Inputs, masked_logits, with_text


def scores(x: Inputs) -> Tensor:
    """Attention from the listed rows only, ``[1, N]``."""
    logits = masked_logits(x.query[:, :, -x.setting.n_rows :], x.key, x.scale)
    received = logits.softmax(-1, dtype=torch.float32).mean((1, 2))
    return received[:, x.shape.before : x.shape.before + x.shape.visual]


def eager_scores(x: Inputs) -> Tensor:
    """Attention of the whole prompt, as a model asked for ``output_attentions`` computes it, then its last rows."""
    weights = masked_logits(x.query, x.key, x.scale).softmax(-1, dtype=torch.float32).to(x.dtype)
    received = weights[:, :, -x.setting.n_rows :].float().mean((1, 2))
    return received[:, x.shape.before : x.shape.before + x.shape.visual]


def colreduce_scores(x: Inputs) -> Tensor:
    """flash-colreduce: it wants a key per query head and reduces rows only."""
    from flash_colreduce import flash_colreduce

    key = x.key.repeat_interleave(x.model.heads // x.model.kv_heads, dim=1)
    query = x.query[:, :, -x.setting.n_rows :]
    received = flash_colreduce(query, key, reduction="sum", is_causal=True).float().mean(1) / query.shape[2]
    return received[:, x.shape.before : x.shape.before + x.shape.visual]


def row_lse(x: Inputs) -> Tensor:
    """Log-sum-exp of the listed rows, ``[1, H, R]``."""
    return masked_logits(x.query[:, :, -x.setting.n_rows :], x.key, x.scale).float().logsumexp(-1)


def select(x: Inputs) -> Tensor:
    """torch.topk, then a sort back into position order."""
    return x.scores.topk(x.shape.keep, dim=-1).indices.sort(dim=-1).values


def select_segments(x: Inputs) -> Tensor:
    """torch.topk and a sort of each segment, joined."""
    lengths, keeps = x.segments
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    parts = zip(x.scores.split(lengths, dim=1), keeps, starts, strict=True)
    return torch.cat(
        [part.topk(k, dim=1).indices.sort(dim=1).values + first for part, k, first in parts], dim=1
    )


def gather(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    """One index_select a tensor."""
    return [t.index_select(t.ndim - 2, index[0]) for t in tensors]


def compact(caches: list[Tensor], index: Tensor) -> list[Tensor]:
    """Gather, then copy back into the front of each cache."""
    for cache in caches:
        cache[:, :, : index.shape[1]] = cache.index_select(2, index[0])
    return caches


def _keep_and_gather(x: Inputs, scores: Tensor) -> tuple[Tensor, list[Tensor]]:
    index = with_text(x, scores.topk(x.shape.keep, dim=-1).indices)
    return index, gather(x.tensors, index)


def prune(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Attention of the listed rows, torch.topk, sort, one index_select a tensor."""
    return _keep_and_gather(x, scores(x))


def prune_scored(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """torch.topk of scores that are there, sort, one index_select a tensor."""
    return _keep_and_gather(x, x.scores)


def eager_prune(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """FastV as published: the whole attention matrix of the layer, then torch.topk, sort, index_select."""
    return _keep_and_gather(x, eager_scores(x))


def colreduce_prune(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """flash-colreduce, then torch.topk, sort, index_select."""
    return _keep_and_gather(x, colreduce_scores(x))


def topk_prune(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """Our scores, then torch.topk, sort, index_select: what selecting and gathering in our kernels is worth."""
    received = ops.received_attention(x.query, x.key, rows=x.rows, columns=x.columns, lse=x.lse)
    return _keep_and_gather(x, received)


def maxmin_loop(x: Inputs) -> Tensor:
    """DivPrune's loop: each step reads the distances to all tokens chosen so far, then takes the farthest token.

    In float32: in 16 bits the distances of 2,880 tokens tie, and the loop chooses others than it is meant to.
    """
    unit = x.features[0].float()
    unit = unit / unit.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    chosen = torch.empty(x.chosen, dtype=torch.int64, device=x.device)
    chosen[0] = distance.topk(2, dim=0, largest=False).values[1].argmax()
    for step in range(1, x.chosen):
        chosen[step] = distance.index_select(0, chosen[:step]).amin(0).argmax()
    return chosen.sort().values[None]


def merge(x: Inputs) -> Tensor:
    """index_add of rows and of ones, then a division."""
    sums = torch.zeros(x.clusters, x.model.hidden, device=x.device)
    sums.index_add_(0, x.assignment[0], x.features[0].float())
    ones = torch.ones(x.shape.visual, device=x.device)
    count = torch.zeros(x.clusters, device=x.device).index_add_(0, x.assignment[0], ones)
    return (sums / count.clamp(min=1)[:, None]).to(x.dtype)[None]


def cluster(x: Inputs) -> Tensor:
    """Density peaks as SparseVLM writes them, without its random tie-breaking: cdist, two topk, an argmin."""
    f, k = x.features.float(), x.clusters
    distance = torch.cdist(f, f) / f.shape[2] ** 0.5
    density = (-distance.topk(k, dim=2, largest=False).values.square().mean(2)).exp()
    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.flatten(1).amax(1)[:, None, None]
    gap = torch.where(denser, distance, farthest).amin(2)
    centers = (gap * density).topk(k, dim=1).indices[0]
    assignment = distance[:, centers].argmin(1)
    assignment[:, centers] = torch.arange(k, device=x.device)
    return assignment


def match(x: Inputs) -> tuple[Tensor, Tensor]:
    """ToMe's matching: the even tokens' cosines to all odd ones, a sort of their largest, the first ``merged`` merge."""
    N, unit = x.shape.visual, x.features[0].float()
    unit = unit / unit.norm(dim=1, keepdim=True)
    best, partner = (unit[::2] @ unit[1::2].T).max(1)
    source = best.argsort(descending=True)[: x.merged]
    stays = torch.ones(N, dtype=torch.bool, device=x.device).index_fill(0, 2 * source, False)
    place, target = stays.cumsum(0) - 1, torch.arange(N, device=x.device)
    target[2 * source] = 2 * partner[source] + 1
    index = (~stays).sort(stable=True).indices[: N - x.merged]
    return place[target][None], index[None]
