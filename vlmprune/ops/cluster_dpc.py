"""Op: density-peak clusters of tokens, found without iteration and without random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops import reference_sets
from vlmprune.ops._checks import check_count, check_features, check_tensor
from vlmprune.ops._operator import operator


def cluster_dpc(
    features: Tensor, clusters: int, *, neighbors: int | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster the tokens of each sample around density peaks (DPC-kNN; SparseVLM's recycling). Never waits for the device.

    Distance = L2 / sqrt(D). Density of a token = exp(-mean of its k smallest squared distances, its own 0 included); its gap =
    distance to the nearest denser token, for the densest the largest distance in the sample. The centres are the tokens with
    the largest density * gap; every other token joins its nearest centre. Deterministic: of two equal densities the lower
    position counts as denser, every other tie goes to the lower position or cluster (SparseVLM adds noise instead).

    The kernel stores the distances of all pairs, ``B * N * N`` float32.

    Args:
        features: ``[B, N, D]`` float32, float16 or bfloat16, last dim contiguous; where not padding, finite and with
            squared distances in the range of float32.
        clusters: how many, at most N; a sample with fewer real tokens makes each of them a cluster.
        neighbors: k, in 1..N; a sample with fewer real tokens uses them all. None = ``clusters``.
        mask: ``[B, N]`` bool, False = padding: in no cluster, and no neighbour of anything. None = no padding.

    Returns:
        ``assignment [B, N]`` int64, each token's cluster, -1 = padding (or no clusters); ``centers [B, clusters]`` int64, the
        centres' positions by decreasing density * gap, -1 on the right.

    Raises:
        InputError: an argument has another rank, shape, dtype, stride, device or value.
        BackendError: no backend can run on the device of ``features``.

    Example:
        >>> tokens = torch.tensor([[[0.0], [0.1], [5.0], [5.2]]])
        >>> ops.cluster_dpc(tokens, clusters=2)
        (tensor([[0, 0, 1, 1]]), tensor([[0, 2]]))
    """
    check_features(features)
    check(features.shape[2] >= 1, "features", "at least one column", tuple(features.shape))
    B, N, _ = features.shape
    check_count("clusters", clusters, N)
    if neighbors is not None:
        check_count("neighbors", neighbors, N)
        check(neighbors >= 1, "neighbors", "at least 1", neighbors)
    check_tensor("mask", mask, [torch.bool], (B, N), features)
    return _cluster_dpc(features, clusters, clusters if neighbors is None else neighbors, mask)


@operator(reference_sets.cluster_dpc)
def _cluster_dpc(
    features: Tensor, clusters: int, neighbors: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, N, _), int64 = features.shape, torch.int64
    return features.new_empty(B, N, dtype=int64), features.new_empty(B, clusters, dtype=int64)
