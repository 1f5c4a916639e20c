"""Op: which tokens merge into which, by bipartite soft matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops import reference_sets
from vlmprune.ops._checks import check_count, check_device, check_dtype, check_features, check_tensor
from vlmprune.ops._operator import operator


def match_bipartite(
    features: Tensor, r: int, *, destinations: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Match tokens for merging (ToMe, Bolya et al. 2023; tomesd with given destinations). Never waits for the device.

    Every token is a destination or a source. A source's match is the destination of largest cosine; the ``r`` sources of
    largest such cosine merge into their matches, every other token stays. Ties go to the lower position, of destinations as
    of sources. A destination may receive many. ``merge_tokens(features, assignment, index.shape[1], weights=sizes)`` merges.

    Args:
        features: ``[B, N, D]`` float32, float16 or bfloat16, last dim contiguous: what is compared (ToMe takes the keys). A
            token whose norm is NaN or outside 1e-15..1e15 (zero, infinite) has cosine 0 to every token.
        r: how many tokens merge, at most the number of sources, 0 without destinations; a sample with fewer real sources, or
            no real destination, merges those it can.
        destinations: distinct positions ``[M]`` or ``[B, M]`` int64. On a CUDA tensor positions outside ``[0, N)`` are
            ignored, on a CPU tensor refused. None = the odd positions (ToMe's alternating split).
        mask: ``[B, N]`` bool, False = padding: neither source nor destination. None = no padding.

    Returns:
        ``assignment [B, N]`` int64, each token's place among the survivors, its match's if it merges, -1 = padding;
        ``index [B, W]`` int64, the survivors' positions, ascending, -1 on the right. W is N - r, or N - min(r, M) with a mask.

    Raises:
        InputError: an argument has another rank, shape, dtype, stride, device or value.
        BackendError: no backend can run on the device of ``features``.

    Example:
        >>> tokens = torch.eye(3)[[0, 0, 1, 2]][None]
        >>> ops.match_bipartite(tokens, r=1)  # the first merges into its double
        (tensor([[0, 0, 1, 2]]), tensor([[1, 2, 3]]))
    """
    check_features(features)
    B, N, _ = features.shape
    if destinations is not None:
        check_dtype("destinations", destinations, torch.int64)
        fits = destinations.ndim in (1, 2) and (destinations.ndim == 1 or destinations.shape[0] == B)
        check(fits, "destinations", f"[M] or [{B}, M]", tuple(destinations.shape))
        few = destinations.shape[-1] <= N
        check(few, "destinations", f"at most {N} positions", tuple(destinations.shape))
        check_device("destinations", destinations, features.device)
    M = _destinations(N, destinations)
    check_count("r", r, N - M if M else 0)
    check_tensor("mask", mask, [torch.bool], (B, N), features)
    return _match_bipartite(features, r, destinations, mask)


def _destinations(N: int, destinations: Tensor | None) -> int:
    """How many there are."""
    return N // 2 if destinations is None else destinations.shape[-1]


def _width(N: int, r: int, destinations: Tensor | None, mask: Tensor | None) -> int:
    """Columns of the index: the most survivors there can be. With no real destination all sources stay."""
    return N - (r if mask is None else min(r, _destinations(N, destinations)))


def _check_positions(destinations: Tensor, N: int) -> None:
    """Distinct positions in 0..N-1; costs a wait, so only CPU tensors are looked at."""
    ranked = destinations.sort(dim=-1).values
    inside = bool(((ranked >= 0) & (ranked < N)).all())
    check(inside, "destinations", f"positions in 0..{N - 1}", destinations.tolist())
    distinct = bool((ranked[..., 1:] != ranked[..., :-1]).all())
    check(distinct, "destinations", "distinct positions", destinations.tolist())


def _call(
    run: Callable[..., Any], features: Tensor, r: int, destinations: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    N = features.shape[1]
    if destinations is not None and destinations.device.type == "cpu":
        _check_positions(destinations, N)
    return run(features, r, destinations, mask, _width(N, r, destinations, mask))


@operator(reference_sets.match_bipartite, _call)
def _match_bipartite(
    features: Tensor, r: int, destinations: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, N, _), int64 = features.shape, torch.int64
    width = _width(N, r, destinations, mask)
    return features.new_empty(B, N, dtype=int64), features.new_empty(B, width, dtype=int64)
