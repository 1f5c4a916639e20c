"""Row log-sum-exp: out[b, h, r] = log sum_s exp(scale * q[b, h, rows[r]] . k[b, h // G, s]) over the keys row r sees.

Memory bound while G * R is small: each key is read once per KV head.
Tile: BLOCK_M (query head of the group, row) pairs against BLOCK_N keys, online softmax in float32.
Grid: (B * Hkv, cdiv(G * R, BLOCK_M), SPLITS). Splits of the keys keep a large GPU busy when there are few rows;
each writes its own log-sum-exp and a second kernel joins them in split order, so the bits never change.
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

TARGET_PROGRAMS = 256  # about two programs for each multiprocessor of a large GPU
MIN_KEYS_PER_SPLIT = 512  # below this, a split costs more in joining than it saves
JOIN_BLOCK = 256


@triton.jit
def _row_lse_kernel(
    query_ptr,  # [B, H, Sq, D], last dim contiguous
    key_ptr,  # [B, Hkv, S, D], last dim contiguous
    cos_ptr,  # [B or 1, S, D] or None
    sin_ptr,
    rows_ptr,  # [B, R] int64, contiguous
    columns_ptr,  # [B, n_keys] int64, contiguous; None = all S keys
    key_mask_ptr,  # [B, S] uint8, contiguous, or None
    out_ptr,  # [SPLITS, B, H, R] float32, contiguous
    scale,
    B,
    Hkv,
    R,
    S,
    first_row,  # key position of the first query
    n_keys,
    keys_per_split,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_cb,
    stride_cs,
    G: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_bh, pid_m, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = (pid_bh // Hkv).to(tl.int64)
    h_kv = (pid_bh % Hkv).to(tl.int64)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < G * R
    h = h_kv * G + offs_m // R
    r = offs_m % R
    row = tl.load(rows_ptr + b * R + r, mask=mask_m, other=-1)  # [BLOCK_M]
    real = row >= 0
    row = tl.maximum(row, 0)
    q_offs = b * stride_qb + h * stride_qh + (row - first_row) * stride_qs
    rope_b = b * stride_cb
    q = load_rows(query_ptr, q_offs, cos_ptr, sin_ptr, rope_b + row * stride_cs, real, D, BLOCK_D, DTYPE)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    start = pid_split * keys_per_split
    for first in range(start, tl.minimum(start + keys_per_split, n_keys), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        at = n.to(tl.int64)
        ok_n = n < n_keys
        if columns_ptr is not None:
            at = tl.load(columns_ptr + b * n_keys + n, mask=ok_n, other=-1)  # [BLOCK_N]
            ok_n = at >= 0
            at = tl.maximum(at, 0)
        if key_mask_ptr is not None:
            ok_n = ok_n & (tl.load(key_mask_ptr + b * S + at, mask=ok_n, other=0) != 0)
        k_offs = b * stride_kb + h_kv * stride_kh + at * stride_ks
        k = load_rows(key_ptr, k_offs, cos_ptr, sin_ptr, rope_b + at * stride_cs, ok_n, D, BLOCK_D, DTYPE)

        logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * (scale * LOG2E)  # [BLOCK_M, BLOCK_N]
        ok = real[:, None] & ok_n[None, :]
        if CAUSAL:
            ok = ok & (row[:, None] >= at[None, :])
        logits = tl.where(ok, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(
            new_top == float("-inf"), 0.0, new_top
        )  # a row that saw nothing yet must not become NaN
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        top = new_top

    seen = total > 0.0
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) / LOG2E, float("-inf"))
    out_row = (pid_split * B + b) * (Hkv * G) + h
    tl.store(out_ptr + out_row * R + r, lse, mask=mask_m)


@triton.jit
def _join_splits_kernel(
    part_ptr,  # [SPLITS, M] float32, contiguous
    out_ptr,  # [M] float32, contiguous
    M,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < M
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for split in range(SPLITS):
        top = tl.maximum(top, tl.load(part_ptr + split * M + offs, mask=mask, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        part = tl.load(part_ptr + split * M + offs, mask=mask, other=float("-inf"))
        total += tl.exp2((part - base) * LOG2E)
    seen = total > 0.0
    lse = tl.where(seen, base + tl.log2(tl.where(seen, total, 1.0)) / LOG2E, float("-inf"))
    tl.store(out_ptr + offs, lse, mask=mask)


def count_splits(n_keys, programs):
    """How many parts the keys are cut into; depends on shapes only, so results repeat bit for bit."""
    wanted = triton.cdiv(TARGET_PROGRAMS, programs)
    return max(1, min(wanted, n_keys // MIN_KEYS_PER_SPLIT))


def row_lse(query, key, rows, key_mask, causal, scale, rope, columns=None):
    """Allocate, cut the keys, launch. ``columns [B, N]`` restricts the sum to those keys. Checked by vlmprune.ops."""
    (B, H, Sq, D), (Hkv, S), R = query.shape, key.shape[1:3], rows.shape[1]
    n_keys = S if columns is None else columns.shape[1]
    if B * R == 0 or n_keys == 0:
        return query.new_full((B, H, R), float("-inf"), dtype=torch.float32)
    config = tiles(query, H // Hkv * R, rope)
    row_tiles = triton.cdiv(H // Hkv * R, config["BLOCK_M"])
    splits = count_splits(n_keys, B * Hkv * row_tiles)
    keys_per_split = triton.cdiv(triton.cdiv(n_keys, splits), config["BLOCK_N"]) * config["BLOCK_N"]
    part = query.new_empty((splits, B, H, R), dtype=torch.float32)
    cos, sin, stride_cb, stride_cs = rope_args(rope, B)
    _row_lse_kernel[(B * Hkv, row_tiles, splits)](
        query,
        key,
        cos,
        sin,
        rows.contiguous(),
        None if columns is None else columns.contiguous(),
        as_bytes(key_mask),
        part,
        scale,
        B,
        Hkv,
        R,
        S,
        S - Sq,
        n_keys,
        keys_per_split,
        *query.stride()[:3],
        *key.stride()[:3],
        stride_cb,
        stride_cs,
        G=H // Hkv,
        D=D,
        CAUSAL=causal,
        DTYPE=dot_dtype(query),
        BLOCK_D=padded_head_dim(D),
        **config,
    )
    if splits == 1:
        return part[0]
    out = torch.empty_like(part[0])
    grid = (triton.cdiv(out.numel(), JOIN_BLOCK),)
    _join_splits_kernel[grid](part, out, out.numel(), SPLITS=splits, BLOCK=JOIN_BLOCK)
    return out
