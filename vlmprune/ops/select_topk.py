"""Op: the positions of the best scores, exact, deterministic and in position order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops import _native, reference
from vlmprune.ops._checks import FLOATS, check_count, check_shape
from vlmprune.ops._dispatch import Backend, always, choose, needs_triton, register


def select_topk(
    scores: Tensor,
    keep: int | Tensor,
    *,
    code: Tensor | None = None,
    segments: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the ``keep`` best scores of each sample, listed in position order. Never waits for the device.

    The higher score wins; ties (and -0.0 against 0.0) go to the lower position; NaN ranks below -inf.

    Args:
        scores: ``[B, N]`` float32, float16 or bfloat16, any strides.
        keep: how many positions survive: an int, or ``[B]`` int64 (clamped on the device to what there is).
        code: ``[B, N]`` int8: 0 = competes, 1 = kept, 2 = dropped. ``keep`` counts code 0 only. None = all compete.
        segments: lengths that add up to N; ``keep`` (an int, no code) then applies to each segment, clipped to its length.

    Returns:
        ``index [B, W]`` int64 ascending, -1 on the right, where W is ``keep`` if it is an int and code is None (with
        segments the sum of what they keep), else N; and ``count [B]`` int64, how many positions of each row are kept.

    Raises:
        ValueError: an argument has another rank, shape, dtype, device or value; an int ``keep`` exceeds N.
        BackendError: no backend can run on the device of ``scores``.
    """
    check(scores.ndim == 2, "scores", "rank 2 [B, N]", tuple(scores.shape))
    check(scores.dtype in FLOATS, "scores", "float32, float16 or bfloat16", scores.dtype)
    B, N = scores.shape
    if isinstance(keep, Tensor):
        check(keep.dtype == torch.int64, "keep", "int64", keep.dtype)
        check_shape("keep", keep, (B,))
        check(keep.device == scores.device, "keep", f"the device {scores.device}", keep.device)
    elif segments is None:
        check_count("keep", keep, N)
    if code is not None:
        check(code.dtype == torch.int8, "code", "int8", code.dtype)
        check_shape("code", code, (B, N))
        check(code.device == scores.device, "code", f"the device {scores.device}", code.device)
    if segments is not None:
        return _select_segments(scores, keep, code, segments)
    if isinstance(keep, Tensor):
        return _select_topk(scores, 0, keep, code)
    return _select_topk(scores, keep, None, code)


def _select_segments(
    scores: Tensor, keep: int | Tensor, code: Tensor | None, segments: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Select within each segment; equal segments become rows of one launch."""
    (B, N), m = scores.shape, len(segments)
    check(not isinstance(keep, Tensor), "keep", "an int with segments", "a tensor")
    check(isinstance(keep, int) and keep >= 0, "keep", "a whole number >= 0", repr(keep))
    check(code is None, "code", "None with segments", "a tensor")
    fits = sum(segments) == N and all(length >= 0 for length in segments)
    check(fits, "segments", f"lengths >= 0 that add up to {N}", list(segments))
    quotas = [min(int(keep), length) for length in segments]
    starts = [sum(segments[:i]) for i in range(m)]
    if m and len(set(segments)) == 1:
        index, _ = _select_topk(scores.reshape(B * m, N // m), quotas[0], None, None)
        first = torch.arange(m, device=scores.device)[:, None] * segments[0]
        index = (index.view(B, m, quotas[0]) + first).view(B, m * quotas[0])
    else:
        parts = torch.split(scores, list(segments), dim=1)
        picked = [_select_topk(part, quota, None, None)[0] for part, quota in zip(parts, quotas, strict=True)]
        shifted = [index + start for index, start in zip(picked, starts, strict=True)]
        index = torch.cat([scores.new_empty((B, 0), dtype=torch.int64), *shifted], dim=1)
    return index, torch.full((B,), sum(quotas), dtype=torch.int64, device=scores.device)


def _width(N: int, keep: int, quota: Tensor | None, code: Tensor | None) -> int:
    """Columns of the index: known on the host."""
    return keep if quota is None and code is None else N


@torch.library.custom_op("vlmprune::select_topk", mutates_args=())
def _select_topk(
    scores: Tensor, keep: int, quota: Tensor | None, code: Tensor | None
) -> tuple[Tensor, Tensor]:
    width = _width(scores.shape[1], keep, quota, code)
    return choose("select_topk", scores)(scores, keep if quota is None else quota, code, width)


@_select_topk.register_fake
def _(scores: Tensor, keep: int, quota: Tensor | None, code: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, N), int64 = scores.shape, torch.int64
    return scores.new_empty(B, _width(N, keep, quota, code), dtype=int64), scores.new_empty(B, dtype=int64)


def _load_triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from vlmprune.triton_kernels.select_topk import select_topk as launch

    return launch


register(
    "select_topk",
    (
        Backend("cuda", lambda: _native.load("select_topk"), _native.needs_extension),
        Backend("triton", _load_triton, needs_triton),
        Backend("reference", lambda: reference.select_topk, always),
    ),
)
