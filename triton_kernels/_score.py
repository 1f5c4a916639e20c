"""The attention that a tile of keys receives in some heads: what every program of the score kernel computes."""

import triton
import triton.language as tl

from vlmprune.triton_kernels._device import LOG2E, load_rows, row_products
from vlmprune.triton_kernels.select_topk import _order_key

PARTS_AT_ONCE = tl.constexpr(8)  # loads in flight while parts are joined
RANK_TILE = tl.constexpr(2048)  # numbers read at once while heads are ranked


@triton.jit
def max_with_nan(x, y):
    """Elementwise maximum; NaN wins."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_over_rows(x, NAN: tl.constexpr):
    """Maximum along dim 0, NaN where a NaN is: the hardware's own maximum would overlook it."""
    has_nan = tl.max((x != x).to(tl.int32), 0) > 0
    return tl.where(has_nan, NAN, tl.max(tl.where(x != x, float("-inf"), x), 0))


# A sample is the tuple (key_ptr, cos_ptr, sin_ptr, rows_ptr, columns_ptr, key_mask_ptr, weight_ptr, pair_ptr), each None or
# as the score kernel has it, at the sample's first key or entry; sizes are (scale, R, N, position of the first query, length);
# strides are those of query, key, lse (head, row) and tables, as the kernel has them.


@triton.jit
def head_scores(
    k,  # [BLOCK_N, BLOCK_D] in DTYPE
    column,  # [BLOCK_N] int64, their positions
    ok_n,  # [BLOCK_N] bool
    query_ptr,  # first query of this head, at key position first_row
    lse_ptr,  # this head's, of the first query or of rows[0]; None = plain logits
    pair_ptr,  # [BLOCK_N], the weights of rows[0] with these columns; None = ones
    sample,
    sizes,
    strides,
    D: tl.constexpr,
    ROW_REDUCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    LSE_BY_POSITION: tl.constexpr,  # lse holds every query, not just the listed rows
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Reduce one head over the rows: [BLOCK_N] float32."""
    _, cos_ptr, sin_ptr, rows_ptr, _, _, weight_ptr, _ = sample
    scale, R, N, first_row, length = sizes
    NAN: tl.constexpr = float("nan")
    reduced = tl.full((BLOCK_N,), float("-inf") if ROW_REDUCE == "max" else 0.0, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    seen = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, R, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        row = tl.load(rows_ptr + offs_m, mask=offs_m < R, other=-1)  # [BLOCK_M]
        real = (row >= tl.maximum(first_row, 0)) & (row < length)
        row = tl.where(real, row, first_row)
        q_row = row - first_row
        q_offs, rope_offs = q_row * strides[0][2], row * strides[3][1]
        q = load_rows(query_ptr, q_offs, cos_ptr, sin_ptr, rope_offs, real, D, BLOCK_D, DTYPE)
        p = row_products(q, k) * scale  # [BLOCK_M, BLOCK_N]
        if lse_ptr is not None:
            at = q_row if LSE_BY_POSITION else offs_m
            lse = tl.load(lse_ptr + at * strides[2][1], mask=real, other=0.0)
            p = tl.exp2((p - lse[:, None]) * LOG2E)
        weight = real.to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + offs_m, mask=real, other=0.0).to(tl.float32)
            p = p * weight[:, None]
        ok = real[:, None] & ok_n[None, :]
        if pair_ptr is not None:
            p = p * tl.load(pair_ptr[None, :] + offs_m.to(tl.int64)[:, None] * N, mask=ok, other=0.0)
        if CAUSAL:
            ok = ok & (row[:, None] >= column[None, :])
        if ROW_REDUCE == "max":
            reduced = max_with_nan(reduced, max_over_rows(tl.where(ok, p, float("-inf")), NAN))
            seen = tl.maximum(seen, tl.max(ok.to(tl.int32), 0))
        else:
            reduced += tl.sum(tl.where(ok, p, 0.0), 0)
        total += weight
    if ROW_REDUCE == "max":
        reduced = tl.where(seen > 0, reduced, 0.0)
    if ROW_REDUCE == "mean":
        weights = tl.sum(total, 0)
        reduced = tl.where(weights > 0.0, reduced / tl.where(weights > 0.0, weights, 1.0), 0.0)
    return reduced


@triton.jit
def score_part(
    query_ptr,  # this sample's first query
    lse_ptr,  # of its first query or row, or None
    part_ptr,  # its part 0
    sample,
    sizes,
    strides,
    G: tl.constexpr,
    HEAD_REDUCE: tl.constexpr,
    tile,  # the constants of head_scores, in its order
):
    """One tile of columns in the query heads of one KV head."""
    key_ptr, cos_ptr, sin_ptr, _, columns_ptr, key_mask_ptr, _, pair_ptr = sample
    N, length = sizes[2], sizes[4]
    D: tl.constexpr = tile[0]
    DTYPE: tl.constexpr = tile[4]
    BLOCK_N: tl.constexpr = tile[6]
    BLOCK_D: tl.constexpr = tile[7]
    h_kv = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.load(columns_ptr + offs_n, mask=offs_n < N, other=-1)  # [BLOCK_N]
    ok_n = (column >= 0) & (column < length)
    column = tl.where(ok_n, column, 0)
    if key_mask_ptr is not None:
        ok_n = ok_n & (tl.load(key_mask_ptr + column, mask=ok_n, other=0) != 0)
    k_offs = h_kv * strides[1][1] + column * strides[1][2]
    k = load_rows(key_ptr, k_offs, cos_ptr, sin_ptr, column * strides[3][1], ok_n, D, BLOCK_D, DTYPE)
    if pair_ptr is not None:
        pair_ptr += offs_n
    joined = tl.full((BLOCK_N,), float("-inf") if HEAD_REDUCE == "max" else 0.0, tl.float32)
    for g in range(G):
        h = h_kv * G + g
        head_lse_ptr = lse_ptr
        if lse_ptr is not None:
            head_lse_ptr = lse_ptr + h * strides[2][0]
        head_ptr = query_ptr + h * strides[0][1]
        reduced = head_scores(
            k, column, ok_n, head_ptr, head_lse_ptr, pair_ptr, sample, sizes, strides, *tile
        )
        if HEAD_REDUCE == "none":
            tl.store(part_ptr + h * N + offs_n, reduced, mask=offs_n < N)
        elif HEAD_REDUCE == "max":
            joined = max_with_nan(joined, reduced)
        else:
            joined += reduced
    if HEAD_REDUCE != "none":
        tl.store(part_ptr + h_kv * N + offs_n, joined, mask=offs_n < N)


@triton.jit
def rank_heads(part_ptr, N, H: tl.constexpr):
    """The rank of each head by its total over the columns, from 0 on: [H up to a power of two] int32."""
    BLOCK_H: tl.constexpr = triton.next_power_of_2(H)
    CHUNK: tl.constexpr = RANK_TILE // BLOCK_H if BLOCK_H < RANK_TILE else 1
    head = tl.arange(0, BLOCK_H)
    x = tl.zeros((BLOCK_H, CHUNK), tl.float32)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        mask = (head < H)[:, None] & (offs < N)[None, :]
        x_offs = head.to(tl.int64)[:, None] * N + offs[None, :]
        x += tl.load(part_ptr + x_offs, mask=mask, other=0.0, cache_modifier=".cg")
    key = tl.where(head < H, _order_key(tl.sum(x, 1)), 0).to(tl.uint32)  # the largest ranks first
    tied = (key[None, :] == key[:, None]) & (head[None, :] < head[:, None])
    return tl.sum(((key[None, :] > key[:, None]) | tied).to(tl.int32), 1)


@triton.jit
def join_parts(
    part_ptr,  # [PARTS, N] float32, this sample's
    ranks,  # of all parts, PARTS of which are joined, the first ones; None = they are as many
    offs,
    N,
    PARTS: tl.constexpr,
    REDUCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum or maximum over the parts at columns ``offs``, always in the same order: [CHUNK] float32."""
    acc = tl.full((CHUNK,), float("-inf") if REDUCE == "max" else 0.0, tl.float32)
    NAN: tl.constexpr = float("nan")
    for first in range(0, PARTS, PARTS_AT_ONCE):
        part = first + tl.arange(0, PARTS_AT_ONCE)
        ok = part < PARTS
        if ranks is not None:
            at = tl.arange(0, ranks.shape[0])
            part = tl.sum(tl.where(ranks[:, None] == part[None, :], at[:, None], 0), 0)
        x_offs = part.to(tl.int64)[:, None] * N + offs[None, :]
        mask = ok[:, None] & (offs < N)[None, :]
        other = float("-inf") if REDUCE == "max" else 0.0
        x = tl.load(part_ptr + x_offs, mask=mask, other=other, cache_modifier=".cg")
        acc = max_with_nan(acc, max_over_rows(x, NAN)) if REDUCE == "max" else acc + tl.sum(x, 0)
    return acc
