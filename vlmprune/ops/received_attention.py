"""Op: the attention that chosen keys receive from chosen query rows, without the S x S matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmprune.ops import reference
from vlmprune.ops._checks import (
    Rope,
    check_choice,
    check_key_mask,
    check_lse,
    check_positions,
    check_query_key,
    check_rope,
    check_row_weight,
)
from vlmprune.ops._dispatch import Backend, always, choose, needs_triton, register

HEAD_REDUCES = ("mean", "max", "sum", "none")
ROW_REDUCES = ("mean", "max", "sum")
NORMALIZES = ("row", "columns", "none")


def received_attention(
    query: Tensor,
    key: Tensor,
    *,
    rows: Tensor,
    columns: Tensor,
    key_mask: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    row_weight: Tensor | None = None,
    head_reduce: str = "mean",
    row_reduce: str = "mean",
    normalize: str = "row",
    scale: float | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Score each column by the attention it receives, as FastV (arXiv:2403.06764) and many after it do.

    Rows are reduced first, within each head, then heads. A real row that cannot see a column counts as 0 in the
    mean; max looks only at the rows that see the column and gives 0 where none does.

    Args:
        query: ``[B, H, Sq, D]`` float32, float16 or bfloat16, last dim contiguous, D at most 256; the last Sq of S positions.
        key: ``[B, Hkv, S, D]``, same dtype; Hkv divides H.
        rows: key positions ``[B, R]`` int64 in ``[S - Sq, S)`` (not checked on the device), -1 = padding.
        columns: key positions ``[B, N]`` int64 in ``[0, S)`` (not checked), -1 = padding, which scores 0.
        key_mask: ``[B, S]`` bool, False = padding; None = no padding.
        causal: whether a row sees only keys up to its own position; False for a vision tower.
        lse: ``[B, H, Sq]`` float32 natural log, from the attention kernel; None = computed here. Only for normalize "row".
        row_weight: ``[B, R]`` float; multiplies each row's attention, and the mean divides by the sum of weights.
        head_reduce: "mean", "max", "sum" or "none" (one score per head).
        row_reduce: "mean", "max" or "sum".
        normalize: "row" = softmax over all keys, "columns" = softmax over the columns only, "none" = raw scaled logits.
        scale: softmax scale; None = ``D ** -0.5``.
        rope: ``(cos, sin)``, each ``[B or 1, S, D]``: score without RoPE, as FEATHER (arXiv:2412.13180).

    Returns:
        ``[B, N]`` float32, or ``[B, H, N]`` for head_reduce "none". Not differentiable.

    Raises:
        ValueError: an argument has another rank, shape, dtype, stride, device or value.
        BackendError: no backend can run on the device of ``query``.
    """
    check_query_key(query, key)
    check_positions("rows", rows, query, "R")
    check_positions("columns", columns, query, "N")
    check_key_mask(key_mask, key)
    check_lse(lse, query, normalize, rope)
    check_row_weight(row_weight, rows)
    check_choice("head_reduce", head_reduce, HEAD_REDUCES)
    check_choice("row_reduce", row_reduce, ROW_REDUCES)
    check_choice("normalize", normalize, NORMALIZES)
    check_rope(rope, key)
    cos, sin = (None, None) if rope is None else rope
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    reduces = (head_reduce, row_reduce, normalize)
    return _received_attention(
        query, key, rows, columns, key_mask, causal, lse, row_weight, *reduces, scale, cos, sin
    )


@torch.library.custom_op("vlmprune::received_attention", mutates_args=())
def _received_attention(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    columns: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    lse: Tensor | None,
    row_weight: Tensor | None,
    head_reduce: str,
    row_reduce: str,
    normalize: str,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    rope = None if cos is None else (cos, sin)
    reduces = (head_reduce, row_reduce, normalize)
    run = choose("received_attention", query)
    return run(query, key, rows, columns, key_mask, causal, lse, row_weight, *reduces, scale, rope)


@_received_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    columns: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    lse: Tensor | None,
    row_weight: Tensor | None,
    head_reduce: str,
    row_reduce: str,
    normalize: str,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    B, H, N = query.shape[0], query.shape[1], columns.shape[1]
    return query.new_empty((B, H, N) if head_reduce == "none" else (B, N), dtype=torch.float32)


def _load_triton() -> Callable[..., Tensor]:
    from vlmprune.triton_kernels.received_attention import received_attention as launch

    return launch


register(
    "received_attention",
    (
        Backend("triton", _load_triton, needs_triton),
        Backend("reference", lambda: reference.received_attention, always),
    ),
)
