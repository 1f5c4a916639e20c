"""Op: log-sum-exp of chosen query rows over all keys, for when no attention kernel has left one behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmprune.ops import reference
from vlmprune.ops._checks import (
    Rope,
    check_key_mask,
    check_packed,
    check_positions,
    check_query_key,
    check_rope,
    check_values,
)
from vlmprune.ops._dispatch import Backend, always, choose, needs_triton, register


def row_lse(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    key_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    rope: Rope | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Natural log of the softmax denominator of each listed query row.

    Args:
        query: ``[B, H, Sq, D]`` float32, float16 or bfloat16, last dim contiguous, D at most 256; the last Sq of S positions.
        key: ``[B, Hkv, S, D]``, same dtype; Hkv divides H.
        rows: key positions ``[B, R]`` int64 in ``[S - Sq, S)``, -1 = padding. On a GPU others count as padding.
        key_mask: ``[B, S]`` bool, False = padding; None = no padding.
        causal: whether a row sees only keys up to its own position.
        scale: softmax scale; None = ``D ** -0.5``.
        rope: ``(cos, sin)``, each ``[B or 1, S, D]``: undo rotate-half RoPE on query and key first.
        cu_seqlens, cu_seqlens_q, max_seqlen: of a packed batch, as in ``received_attention``; None = a padded batch.

    Returns:
        ``[B, H, R]`` float32; -inf for padding rows and for rows that see no key. Not differentiable.

    Raises:
        ValueError: an argument has another rank, shape, dtype, stride or device, or on the CPU an entry out of range.
        BackendError: no backend can run on the device of ``query``.
    """
    check_query_key(query, key)
    B = check_packed(query, key, key_mask, cu_seqlens, cu_seqlens_q, max_seqlen)
    check_positions("rows", rows, B, query, "R")
    check_key_mask(key_mask, key)
    check_rope(rope, key)
    cos, sin = (None, None) if rope is None else rope
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seqs = (cu_seqlens, cu_seqlens_q, max_seqlen)
    return _row_lse(query, key, rows, key_mask, causal, scale, cos, sin, *seqs)


@torch.library.custom_op("vlmprune::row_lse", mutates_args=())
def _row_lse(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    seqs = (cu_seqlens, cu_seqlens_q, max_seqlen)
    check_values(query, key, rows, None, *seqs)
    rope = None if cos is None else (cos, sin)
    return choose("row_lse", query)(query, key, rows, key_mask, causal, scale, rope, *seqs)


@_row_lse.register_fake
def _(query: Tensor, key: Tensor, rows: Tensor, *settings: object) -> Tensor:
    return query.new_empty(rows.shape[0], query.shape[1], rows.shape[1], dtype=torch.float32)


def _load_triton() -> Callable[..., Tensor]:
    from vlmprune.triton_kernels.row_lse import row_lse as launch

    return launch


register(
    "row_lse",
    (Backend("triton", _load_triton, needs_triton), Backend("reference", lambda: reference.row_lse, always)),
)
