"""Op: the attention that chosen keys receive from chosen query rows, without the S x S matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops import reference
from vlmprune.ops._checks import (
    Rope,
    check_choice,
    check_count,
    check_key_mask,
    check_lse,
    check_packed,
    check_positions,
    check_query_key,
    check_rope,
    check_row_weight,
    check_values,
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
    top_heads: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Score each column by the attention it receives, as FastV (arXiv:2403.06764) and many after it do.

    Rows are reduced first, within each head, then heads. A real row that cannot see a column counts as 0 in the
    mean; max looks only at the rows that see the column and gives 0 where none does. A score is NaN where a row or a
    head it is made of is NaN; what is masked or not yet visible may hold anything.

    Packed batches follow FlashAttention's variable-length calls: the samples lie end to end in ``query [1, H, total_q, D]``
    and ``key [1, Hkv, total_k, D]``, sample b at ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Rows and columns count from
    the start of their sample, and B below is the number of samples; ``lse`` is ``[1, H, total_q]`` or ``[H, total_q]``.

    Args:
        query: ``[B, H, Sq, D]`` float32, float16 or bfloat16, last dim contiguous, D at most 256; the last Sq of S positions.
        key: ``[B, Hkv, S, D]``, same dtype; Hkv divides H.
        rows: key positions ``[B, R]`` int64 in ``[S - Sq, S)``, -1 = padding. On a GPU others count as padding.
        columns: key positions ``[B, N]`` int64 in ``[0, S)``, -1 = padding, which scores 0. On a GPU others do too.
        key_mask: ``[B, S]`` bool, False = padding; None = no padding.
        causal: whether a row sees only keys up to its own position; False for a vision tower.
        lse: ``[B, H, Sq]`` float32 natural log, from the attention kernel; None = computed here. Only for normalize "row".
        row_weight: ``[B, R]`` float; multiplies each row's attention, and the mean divides by the sum of weights.
        head_reduce: "mean", "max", "sum" or "none" (one score per head).
        row_reduce: "mean", "max" or "sum".
        normalize: "row" = softmax over all keys, "columns" = softmax over the columns only, "none" = raw scaled logits.
        scale: softmax scale; None = ``D ** -0.5``.
        rope: ``(cos, sin)``, each ``[B or 1, S, D]``: score without RoPE, as FEATHER (arXiv:2412.13180).
        top_heads: reduce only over this many heads, those whose scores sum to most over the columns (ties: the lower
            head), as SparseVLM+; None = all heads. Not with head_reduce "none".
        cu_seqlens: ``[B + 1]`` int32 or int64, bounds of the samples of a packed batch; None = a padded batch.
        cu_seqlens_q: bounds of the queries, if they are not those of the keys: each sample's last ones.
        max_seqlen: length of the longest sample; None = not known, total_k at most.

    Returns:
        ``[B, N]`` float32, or ``[B, H, N]`` for head_reduce "none". Not differentiable.

    Raises:
        ValueError: an argument has another rank, shape, dtype, stride, device or value (of tensors on the CPU: the
            entries too).
        BackendError: no backend can run on the device of ``query``.
    """
    check_query_key(query, key)
    B = check_packed(query, key, key_mask, cu_seqlens, cu_seqlens_q, max_seqlen)
    check_positions("rows", rows, B, query, "R")
    check_positions("columns", columns, B, query, "N")
    check_key_mask(key_mask, key)
    lse = with_batch_dim(lse, cu_seqlens)
    check_lse(lse, query, normalize, rope)
    check_row_weight(row_weight, rows)
    check_choice("head_reduce", head_reduce, HEAD_REDUCES)
    check_choice("row_reduce", row_reduce, ROW_REDUCES)
    check_choice("normalize", normalize, NORMALIZES)
    check_rope(rope, key)
    check_top_heads(top_heads, head_reduce, query)
    cos, sin = (None, None) if rope is None else rope
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    reduces = (head_reduce, row_reduce, normalize)
    tail = (scale, cos, sin, top_heads, cu_seqlens, cu_seqlens_q, max_seqlen)
    return _received_attention(query, key, rows, columns, key_mask, causal, lse, row_weight, *reduces, *tail)


def with_batch_dim(lse: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """FlashAttention's variable-length calls return ``[H, total_q]``: give it the batch dim of 1 that query has."""
    return lse[None] if lse is not None and cu_seqlens is not None and lse.ndim == 2 else lse


def check_top_heads(top_heads: int | None, head_reduce: str, query: Tensor) -> None:
    """A whole number in 1..H, or None."""
    if top_heads is not None:
        check(head_reduce != "none", "top_heads", "None with head_reduce 'none'", top_heads)
        check_count("top_heads", top_heads, query.shape[1])
        check(top_heads > 0, "top_heads", f"a whole number in 1..{query.shape[1]}", top_heads)


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
    top_heads: int | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    seqs = (cu_seqlens, cu_seqlens_q, max_seqlen)
    check_values(query, key, rows, columns, *seqs)
    rope = None if cos is None else (cos, sin)
    reduces = (head_reduce, row_reduce, normalize, scale, rope, top_heads)
    run = choose("received_attention", query)
    return run(query, key, rows, columns, key_mask, causal, lse, row_weight, *reduces, *seqs)


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
    *settings: object,
) -> Tensor:
    (B, N), H = columns.shape, query.shape[1]
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
