"""Op: one token a cluster, the sum or the mean of the tokens assigned to it."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.ops import reference_sets
from vlmprune.ops._checks import FLOATS, check_choice, check_count, check_features, check_tensor
from vlmprune.ops._operator import operator

MODES = ("mean", "sum")


def merge_tokens(
    features: Tensor, assignment: Tensor, clusters: int, *, mode: str = "mean", weights: Tensor | None = None
) -> Tensor:
    """Merge the tokens of each cluster (SparseVLM, VisionZip, VScan, PruMerge). Never waits for the device.

    Sums are float32. The kernel adds in an order that depends on shapes only, so the bits repeat.

    Args:
        features: ``[B, N, D]`` float32, float16 or bfloat16, last dim contiguous.
        assignment: ``[B, N]`` int64, each token's cluster; -1 (anything outside ``[0, clusters)``) = ignored, whatever the
            token holds.
        clusters: how many, any number >= 0.
        mode: "sum" = sum of w x; "mean" = that over the sum of w, and 0 where the sum of w is 0 (an empty cluster).
        weights: w, ``[B, N]`` float32, float16 or bfloat16; None = ones.

    Returns:
        ``[B, clusters, D]``, contiguous, in the dtype of ``features``. Not differentiable.

    Raises:
        InputError: an argument has another rank, shape, dtype, stride, device or value.
        BackendError: no backend can run on the device of ``features``.

    Example:
        >>> tokens = torch.tensor([[[2.0], [4.0], [9.0]]])
        >>> ops.merge_tokens(tokens, torch.tensor([[0, 0, 1]]), clusters=2).flatten()
        tensor([3., 9.])
    """
    check_features(features)
    B, N, _ = features.shape
    check_tensor("assignment", assignment, [torch.int64], (B, N), features)
    check_count("clusters", clusters)
    check_choice("mode", mode, MODES)
    check_tensor("weights", weights, FLOATS, (B, N), features)
    return _merge_tokens(features, assignment, clusters, mode, weights)


@operator(reference_sets.merge_tokens)
def _merge_tokens(
    features: Tensor, assignment: Tensor, clusters: int, mode: str, weights: Tensor | None
) -> Tensor:
    return features.new_empty(features.shape[0], clusters, features.shape[2])
