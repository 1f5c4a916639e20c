"""Received attention: out[b, n] = reduce over heads, rows of w[r] * exp(scale * q[rows[r]] . k[columns[n]] - lse[r]).

Memory bound for few rows (each chosen key is read once per KV head), compute bound from about a hundred rows on.
Tile: one program holds BLOCK_N keys of one KV head and walks its G query heads and their row tiles; rows are
reduced in registers, heads by a second kernel in head order: no float atomics, so the bits never change.
Grid: (cdiv(N, BLOCK_N), Hkv, B), then (cdiv(N, HEADS_BLOCK), B).
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import (
    LOG2E,
    as_bytes,
    dot_dtype,
    load_rows,
    padded_head_dim,
    rope_args,
    tiles,
)
from vlmprune.triton_kernels.row_lse import row_lse

HEADS_BLOCK = 128


@triton.jit
def _received_attention_kernel(
    query_ptr,  # [B, H, Sq, D], last dim contiguous
    key_ptr,  # [B, Hkv, S, D], last dim contiguous
    cos_ptr,  # [B or 1, S, D] or None
    sin_ptr,
    rows_ptr,  # [B, R] int64, contiguous
    columns_ptr,  # [B, N] int64, contiguous
    key_mask_ptr,  # [B, S] uint8, contiguous, or None
    lse_ptr,  # [B, H, Sq or R] float32; None = plain logits
    weight_ptr,  # [B, R] float, contiguous, or None
    out_ptr,  # [B, H, N] float32, contiguous
    scale,
    R,
    N,
    S,
    first_row,  # key position of the first query
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_lb,
    stride_lh,
    stride_ls,
    stride_cb,
    stride_cs,
    G: tl.constexpr,
    D: tl.constexpr,
    ROW_REDUCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    LSE_BY_POSITION: tl.constexpr,  # lse holds every query, not just the listed rows
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_n, h_kv, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rope_b = b * stride_cb

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    column = tl.load(columns_ptr + b * N + offs_n, mask=mask_n, other=-1)  # [BLOCK_N]
    ok_n = column >= 0
    column = tl.maximum(column, 0)
    if key_mask_ptr is not None:
        ok_n = ok_n & (tl.load(key_mask_ptr + b * S + column, mask=ok_n, other=0) != 0)
    k_offs = b * stride_kb + h_kv * stride_kh + column * stride_ks
    k = load_rows(key_ptr, k_offs, cos_ptr, sin_ptr, rope_b + column * stride_cs, ok_n, D, BLOCK_D, DTYPE)

    for g in range(G):
        h = h_kv * G + g
        if ROW_REDUCE == "max":
            reduced = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        else:
            reduced = tl.zeros((BLOCK_N,), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(0, R, BLOCK_M):
            offs_m = first + tl.arange(0, BLOCK_M)
            row = tl.load(rows_ptr + b * R + offs_m, mask=offs_m < R, other=-1)  # [BLOCK_M]
            real = row >= 0
            row = tl.maximum(row, 0)
            q_row = row - first_row
            q_offs = b * stride_qb + h * stride_qh + q_row * stride_qs
            q = load_rows(
                query_ptr, q_offs, cos_ptr, sin_ptr, rope_b + row * stride_cs, real, D, BLOCK_D, DTYPE
            )
            p = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale  # [BLOCK_M, BLOCK_N]
            if lse_ptr is not None:
                at = q_row if LSE_BY_POSITION else offs_m
                lse_offs = b * stride_lb + h * stride_lh + at * stride_ls
                lse = tl.load(lse_ptr + lse_offs, mask=real, other=0.0)
                p = tl.exp2((p - lse[:, None]) * LOG2E)
            weight = real.to(tl.float32)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + b * R + offs_m, mask=real, other=0.0).to(tl.float32)
                p = p * weight[:, None]
            ok = real[:, None] & ok_n[None, :]
            if CAUSAL:
                ok = ok & (row[:, None] >= column[None, :])
            if ROW_REDUCE == "max":
                reduced = tl.maximum(reduced, tl.max(tl.where(ok, p, float("-inf")), 0))
            else:
                reduced += tl.sum(tl.where(ok, p, 0.0), 0)
            total += weight
        if ROW_REDUCE == "max":
            reduced = tl.where(reduced == float("-inf"), 0.0, reduced)
        if ROW_REDUCE == "mean":
            weights = tl.sum(total, 0)
            reduced = tl.where(weights > 0.0, reduced / tl.where(weights > 0.0, weights, 1.0), 0.0)
        tl.store(out_ptr + (b * (tl.num_programs(1) * G) + h) * N + offs_n, reduced, mask=mask_n)


@triton.jit
def _reduce_heads_kernel(
    part_ptr,  # [B, H, N] float32, contiguous
    out_ptr,  # [B, N] float32, contiguous
    H,
    N,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    acc = tl.load(part_ptr + b * H * N + offs, mask=mask)  # [BLOCK]
    for h in range(1, H):
        part = tl.load(part_ptr + (b * H + h) * N + offs, mask=mask)
        if REDUCE == "max":
            acc = tl.maximum(acc, part)
        else:
            acc += part
    if REDUCE == "mean":
        acc = acc / H
    tl.store(out_ptr + b * N + offs, acc, mask=mask)


def received_attention(
    query,
    key,
    rows,
    columns,
    key_mask,
    causal,
    lse,
    row_weight,
    head_reduce,
    row_reduce,
    normalize,
    scale,
    rope,
):
    """Launch the row statistics if needed, the scores, and the sum over heads. Checked by vlmprune.ops."""
    (B, H, Sq, D), (Hkv, S), (R, N) = query.shape, key.shape[1:3], (rows.shape[1], columns.shape[1])
    shape = (B, H, N) if head_reduce == "none" else (B, N)
    if B * N * R == 0:
        return query.new_zeros(shape, dtype=torch.float32)
    by_position = lse is not None
    if normalize != "none" and lse is None:
        only = columns if normalize == "columns" else None
        lse = row_lse(query, key, rows, key_mask, causal, scale, rope, only)
    part = query.new_empty((B, H, N), dtype=torch.float32)
    cos, sin, stride_cb, stride_cs = rope_args(rope, B)
    config = tiles(query, R, rope)
    _received_attention_kernel[(triton.cdiv(N, config["BLOCK_N"]), Hkv, B)](
        query,
        key,
        cos,
        sin,
        rows.contiguous(),
        columns.contiguous(),
        as_bytes(key_mask),
        lse,
        None if row_weight is None else row_weight.contiguous(),
        part,
        scale,
        R,
        N,
        S,
        S - Sq,
        *query.stride()[:3],
        *key.stride()[:3],
        *((0, 0, 0) if lse is None else lse.stride()),
        stride_cb,
        stride_cs,
        G=H // Hkv,
        D=D,
        ROW_REDUCE=row_reduce,
        CAUSAL=causal,
        LSE_BY_POSITION=by_position,
        DTYPE=dot_dtype(query),
        BLOCK_D=padded_head_dim(D),
        **config,
    )
    if head_reduce == "none":
        return part
    out = query.new_empty((B, N), dtype=torch.float32)
    grid = (triton.cdiv(N, HEADS_BLOCK), B)
    _reduce_heads_kernel[grid](part, out, H, N, REDUCE=head_reduce, BLOCK=HEADS_BLOCK)
    return out
