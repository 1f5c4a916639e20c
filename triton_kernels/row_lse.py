"""Row log-sum-exp: out[b, h, r] = log sum_s exp(scale * q[b, h, rows[r]] . k[b, h // G, s]) over the keys row r sees.

Memory bound while G * R is small: each key is read once per KV head.
Tile: BLOCK_M (query head of the group, row) pairs against BLOCK_N keys, online softmax in float32.
Grid: (B * Hkv, cdiv(G * R, BLOCK_M), splits). A split is KEYS_PER_SPLIT keys of a sample, whatever the batch, so that its
bits depend on the sample alone; each writes its own log-sum-exp, and the last of a tile to arrive joins them in order.
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import (
    LOG2E,
    arrives_last,
    dot_dtype,
    laid_out,
    let_next_begin,
    load_rows,
    padded_head_dim,
    registers,
    span,
    tiles,
    wait_for_inputs,
)
from vlmprune.triton_kernels._launch import launch

KEYS_PER_SPLIT = 512  # with fewer, a split costs more in joining than it saves
SPLITS_AT_ONCE = tl.constexpr(16)  # loads in flight while splits are joined


@triton.jit
def _key_positions(columns_ptr, key_mask_ptr, n, n_keys, length):
    """Positions of keys number ``n``, and which of them are there."""
    at = n.to(tl.int64)
    ok = n < n_keys
    if columns_ptr is not None:
        at = tl.load(columns_ptr + n, mask=ok, other=-1)
        ok = (at >= 0) & (at < length)
        at = tl.maximum(at, 0)
    if key_mask_ptr is not None:
        ok = ok & (tl.load(key_mask_ptr + at, mask=ok, other=0) != 0)
    return at, ok


@triton.jit
def _join_splits(part_ptr, stride_split, offs, mask, splits, BLOCK_M: tl.constexpr):
    """Log-sum-exp over the splits, in split order: [BLOCK_M]. Splits without keys change no bit."""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        split = first + tl.arange(0, SPLITS_AT_ONCE)
        ok = (split < splits)[:, None] & mask[None, :]
        part_offs = split.to(tl.int64)[:, None] * stride_split + offs[None, :]
        part = tl.load(part_ptr + part_offs, mask=ok, other=float("-inf"), cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(part, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((part - base[None, :]) * LOG2E), 0)
        top = new_top
    seen = total != 0.0  # NaN stays NaN
    return tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)) / LOG2E, float("-inf"))


@triton.jit(do_not_specialize=["B", "Hkv", "R", "Sq", "S", "N", "max_seqlen"])
def _row_lse_kernel(
    query_ptr,  # [B, H, Sq, D], last dim contiguous; packed: [1, H, total, D]
    key_ptr,  # [B, Hkv, S, D], last dim contiguous; packed: [1, Hkv, total, D]
    cos_ptr,  # [B or 1, S, D] or None
    sin_ptr,
    rows_ptr,  # [B, R] int64, contiguous
    columns_ptr,  # [B, N] int64, contiguous; None = all S keys
    key_mask_ptr,  # [B, S] uint8, contiguous, or None
    cu_seqlens_ptr,  # [B + 1], contiguous, or None
    cu_seqlens_q_ptr,
    counter_ptr,  # [B * Hkv, row tiles] int32, all 0, and again when done; None for one split
    part_ptr,  # [splits, B, H, R] float32, contiguous; the output if there is one split
    out_ptr,  # [B, H, R] float32, contiguous
    scale,
    B,
    Hkv,
    R,
    Sq,
    S,
    N,
    max_seqlen,
    query_strides,  # batch, head, position
    key_strides,
    rope_strides,  # batch, position
    G: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PDL: tl.constexpr,
    KEYS_PER_SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wait_for_inputs(PDL)
    pid_bh, pid_m, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = (pid_bh // Hkv).to(tl.int64)
    h_kv = (pid_bh % Hkv).to(tl.int64)
    start_k, length = span(cu_seqlens_ptr, b, S, max_seqlen)
    start_q, length_q = span(cu_seqlens_q_ptr, b, Sq, max_seqlen)
    first_row = length - length_q  # key position of the first query
    n_keys = length
    if columns_ptr is not None:
        columns_ptr += b * N
        n_keys = N
    if key_mask_ptr is not None:
        key_mask_ptr += b * S
    key_ptr += b * key_strides[0] + h_kv * key_strides[1] + start_k * key_strides[2]
    if cos_ptr is not None:
        cos_ptr += b * rope_strides[0] + start_k * rope_strides[1]
        sin_ptr += b * rope_strides[0] + start_k * rope_strides[1]

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < G * R
    h = h_kv * G + offs_m // R
    r = offs_m % R
    row = tl.load(rows_ptr + b * R + r, mask=mask_m, other=-1)  # [BLOCK_M]
    real = (row >= tl.maximum(first_row, 0)) & (row < length)
    row = tl.where(real, row, first_row)
    q_offs = b * query_strides[0] + h * query_strides[1] + (start_q + row - first_row) * query_strides[2]
    q = load_rows(query_ptr, q_offs, cos_ptr, sin_ptr, row * rope_strides[1], real, D, BLOCK_D, DTYPE)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    start = pid_split * KEYS_PER_SPLIT
    for first in range(start, tl.minimum(start + KEYS_PER_SPLIT, n_keys), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        at, ok_n = _key_positions(columns_ptr, key_mask_ptr, n, n_keys, length)  # [BLOCK_N]
        k_offs, rope_offs = at * key_strides[2], at * rope_strides[1]
        k = load_rows(key_ptr, k_offs, cos_ptr, sin_ptr, rope_offs, ok_n, D, BLOCK_D, DTYPE)
        # not row_products: in a function of its own the product is scheduled otherwise
        logits = tl.dot(q, tl.trans(k), input_precision="ieee" if tl.target_info.is_hip() else "tf32x3")
        logits *= scale * LOG2E  # [BLOCK_M, BLOCK_N]
        ok = real[:, None] & ok_n[None, :]
        if CAUSAL:
            ok = ok & (row[:, None] >= at[None, :])
        logits = tl.where(ok, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # a row that saw nothing yet must not become NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        top = new_top

    let_next_begin(PDL)
    seen = total != 0.0  # NaN stays NaN
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) / LOG2E, float("-inf"))
    stride_split = (tl.zeros((), tl.int64) + B) * Hkv * G * R
    out_offs = (b * (Hkv * G) + h) * R + r
    tl.store(part_ptr + pid_split * stride_split + out_offs, lse, mask=mask_m)
    if counter_ptr is not None:
        last = arrives_last(counter_ptr + pid_bh * tl.num_programs(1) + pid_m, tl.num_programs(2))
        if last:
            lse = _join_splits(part_ptr, stride_split, out_offs, mask_m, tl.num_programs(2), BLOCK_M)
            tl.store(out_ptr + out_offs, lse, mask=mask_m)


def row_lse(s):
    """Allocate, cut the keys, launch. Sums over all keys, or the columns if it is they that s normalizes over."""
    (H, Sq, D), (Hkv, S), (B, R) = s.query.shape[1:], s.key.shape[1:3], s.rows.shape
    s, query_strides, key_strides, rope_strides = laid_out(s)
    columns = s.columns if s.normalize == "columns" else None
    n_keys = s.max_seqlen if columns is None else columns.shape[1]
    if B * R == 0 or n_keys == 0:
        return s.query.new_full((B, H, R), float("-inf"), dtype=torch.float32)
    config = tiles(s.query, H // Hkv * R, s.cos is not None)
    row_tiles = triton.cdiv(H // Hkv * R, config["BLOCK_M"])
    splits = triton.cdiv(n_keys, KEYS_PER_SPLIT)
    part = s.query.new_empty((splits, B, H, R), dtype=torch.float32)
    out = part[0] if splits == 1 else torch.empty_like(part[0])
    counter = None if splits == 1 else s.query.new_zeros(B * Hkv * row_tiles, dtype=torch.int32)
    sizes = (s.scale, B, Hkv, R, Sq, S, 0 if columns is None else n_keys, s.max_seqlen)
    launch(
        _row_lse_kernel,
        (B * Hkv, row_tiles, splits),
        *(s.query, s.key, s.cos, s.sin, s.rows, columns, s.key_mask, s.cu_seqlens, s.cu_seqlens_q),
        *(counter, part, out, *sizes, query_strides, key_strides, rope_strides),
        G=H // Hkv,
        D=D,
        CAUSAL=s.causal,
        KEYS_PER_SPLIT=KEYS_PER_SPLIT,
        DTYPE=dot_dtype(s.query),
        BLOCK_D=padded_head_dim(D),
        **registers(255),
        **config,
    )
    return out
