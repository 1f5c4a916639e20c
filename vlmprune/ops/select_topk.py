"""Op: the positions of the best scores, exact, deterministic and in position order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.constants import filled
from vlmprune.errors import check
from vlmprune.ops import reference
from vlmprune.ops._checks import FLOATS, check_count, check_dtype, check_tensor
from vlmprune.ops._dispatch import choose, launches
from vlmprune.ops._operator import operator


def select_topk(
    scores: Tensor,
    keep: int | Sequence[int] | Tensor | None = None,
    *,
    code: Tensor | None = None,
    segments: Sequence[int] | None = None,
    threshold: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the ``keep`` best scores of each sample, listed in position order. Never waits for the device.

    The higher score wins; ties (and -0.0 against 0.0) go to the lower position; NaN ranks below -inf.

    Args:
        scores: ``[B, N]`` float32, float16 or bfloat16, any strides.
        keep: how many positions survive: an int, or ``[B]`` int64 (clamped on the device to what there is). None = all that
            reach ``threshold``.
        code: ``[B, N]`` int8: 0 = competes, 1 = kept, 2 = dropped. ``keep`` counts code 0 only. None = all compete.
        segments: lengths that add up to N; ``keep`` (an int, or one for each segment; no code, no threshold) then applies to
            each segment, clipped to its length.
        threshold: a number, or ``[B]`` float32: of code 0 only scores >= threshold, compared in float32, compete; ``keep``
            caps their number. NaN reaches no threshold, and nothing reaches a NaN.

    Returns:
        ``index [B, W]`` int64 ascending, -1 on the right, where W is ``keep`` if it is an int and code is None (with
        segments the sum over them), otherwise N; ``count [B]`` int64, how many positions are listed.

    Raises:
        InputError: an argument has another rank, shape, dtype, device or value; an int ``keep`` exceeds N.
        BackendError: no backend can run on the device of ``scores``.

    Example:
        >>> scores = torch.tensor([[0.3, 0.9, 0.1, 0.9]])
        >>> ops.select_topk(scores, 2)
        (tensor([[1, 3]]), tensor([2]))
        >>> ops.select_topk(scores, 1, segments=[2, 2])[0]  # of each half the best
        tensor([[1, 3]])
    """
    check(scores.ndim == 2, "scores", "rank 2 [B, N]", tuple(scores.shape))
    check_dtype("scores", scores, *FLOATS)
    if segments is not None:
        check(code is None, "code", "None with segments", "a tensor")
        check(threshold is None, "threshold", "None with segments", threshold)
        return _in_segments(scores, keep, segments)
    B, N = scores.shape
    if keep is None and threshold is not None:
        keep = N
    if isinstance(keep, Tensor):
        check_tensor("keep", keep, [torch.int64], (B,), scores)
    else:
        check_count("keep", keep, N)
    check_tensor("code", code, [torch.int8], (B, N), scores)
    if isinstance(threshold, Tensor):
        check_tensor("threshold", threshold, [torch.float32], (B,), scores)
    elif threshold is not None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        check(number and threshold == threshold, "threshold", "a number", repr(threshold))
    cap, quota = (0, keep) if isinstance(keep, Tensor) else (keep, None)
    level, levels = (None, threshold) if isinstance(threshold, Tensor) else (threshold, None)
    return _select_topk(scores, cap, quota, code, level, levels)


def positions_of(marked: Tensor, width: int) -> Tensor:
    """Where ``marked [B, N]`` bool is True, ``[B, width]`` int64 ascending, -1 on the right. Not differentiable, never waits.

    Example:
        >>> positions_of(torch.tensor([[False, True, True]]), 2)
        tensor([[1, 2]])
    """
    blank = filled((1, 1), 0.0, torch.float32, marked.device).expand(marked.shape)
    code = marked.view(torch.int8)  # True stays, False competes for none
    # the dispatcher takes longer than this one kernel
    if type(marked) is Tensor and launches("select_topk", marked):
        return choose("select_topk", marked)(blank, 0, code, width, None)[0]
    return _select_topk(blank, 0, None, code)[0][:, :width].contiguous()


def _in_segments(
    scores: Tensor, keep: int | Sequence[int] | Tensor | None, segments: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Select within each segment; how many is known on the host."""
    B, N = scores.shape
    fits = sum(segments) == N and all(length >= 0 for length in segments)
    check(fits, "segments", f"lengths >= 0 that add up to {N}", list(segments))
    check(not isinstance(keep, Tensor), "keep", "an int, or one a segment", "a tensor")
    wanted: list[Any] = list(keep) if isinstance(keep, Sequence) else [keep] * len(segments)
    for quota in wanted:
        check_count("keep", quota)
    check(len(wanted) == len(segments), "keep", f"one int for each of {len(segments)} segments", len(wanted))
    quotas = [min(number, length) for number, length in zip(wanted, segments, strict=True)]
    count = torch.full((B,), sum(quotas), dtype=torch.int64, device=scores.device)
    return _select_segments(scores, list(segments), quotas), count


def _call(
    run: Callable[..., Any],
    scores: Tensor,
    keep: int,
    quota: Tensor | None,
    code: Tensor | None,
    threshold: float | None = None,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    width, least = _width(scores, keep, quota, code), threshold if thresholds is None else thresholds
    return run(scores, keep if quota is None else quota, code, width, least)


@operator(reference.select_topk, _call, cuda=True)
def _select_topk(
    scores: Tensor,
    keep: int,
    quota: Tensor | None,
    code: Tensor | None,
    threshold: float | None = None,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, width = scores.shape[0], _width(scores, keep, quota, code)
    return scores.new_empty(B, width, dtype=torch.int64), scores.new_empty(B, dtype=torch.int64)


def _width(scores: Tensor, keep: int, quota: Tensor | None, code: Tensor | None) -> int:
    """Columns of the index: known on the host."""
    return keep if quota is None and code is None else scores.shape[1]


@operator(reference.select_segments, cuda=True)
def _select_segments(scores: Tensor, segments: Sequence[int], quotas: Sequence[int]) -> Tensor:
    return scores.new_empty(scores.shape[0], sum(quotas), dtype=torch.int64)
