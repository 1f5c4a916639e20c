"""The attention that a tile of keys receives in some heads: what every program of the score kernel computes."""

import triton
import triton.language as tl

from vlmprune.triton_kernels._columns import enter_columns
from vlmprune.triton_kernels._device import LOG2E, load_rows, row_products
from vlmprune.triton_kernels.select_topk import _order_key

PARTS_AT_ONCE = tl.constexpr(16)  # loads in flight while parts are joined
RANK_TILE = tl.constexpr(2048)  # numbers read at once while heads are ranked


@triton.jit
def max_with_nan(x, y):
    """Elementwise maximum; NaN wins."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_over(x, DIM: tl.constexpr):
    """Maximum along a dim, NaN where a NaN is: the hardware's own maximum would overlook it."""
    NAN: tl.constexpr = float("nan")
    has_nan = tl.max((x != x).to(tl.int32), DIM) > 0
    return tl.where(has_nan, NAN, tl.max(tl.where(x != x, float("-inf"), x), DIM))


# A sample is the tuple (query_ptr, lse_ptr, key_ptr, cos_ptr, sin_ptr, rows_ptr, columns_ptr, key_mask_ptr, weight_ptr,
# pair_ptr), each None or as the score kernel has it, at the sample's first query, key or entry; sizes are (scale, R, N,
# position of the first query, length); strides are those of query, key, lse (head, row) and tables, as the kernel has them.
# Rows are the tuple (head of the tile, number, position, whether it is there, weight) of [HEADS * ROWS]: the same ROWS rows
# for each of HEADS query heads, which share one matrix product.


@triton.jit
def _rows(sample, sizes, first, G: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Rows number ``first`` and the next."""
    _, _, _, _, _, rows_ptr, _, _, weight_ptr, _ = sample
    _, R, _, first_row, length = sizes
    m = tl.arange(0, HEADS * ROWS)
    head, r = m // ROWS, first + m % ROWS
    row = tl.load(rows_ptr + r, mask=r < R, other=-1)
    real = (row >= tl.maximum(first_row, 0)) & (row < length) & (head < G)
    weight = real.to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + r, mask=real, other=0.0).to(tl.float32)
    return head, r, tl.where(real, row, first_row), real, weight


@triton.jit
def _log_sums(sample, sizes, strides, rows, h, LSE_BY_POSITION: tl.constexpr):
    """The log-sum-exp of rows in the heads from ``h`` on."""
    head, r, row, real, _ = rows
    lse_ptr = sample[1]
    at = row - sizes[3] if LSE_BY_POSITION else r
    return tl.load(lse_ptr + (h + head) * strides[2][0] + at * strides[2][1], mask=real, other=0.0)


@triton.jit
def _products(
    sample,
    sizes,
    strides,
    rows,
    lse,  # None for plain logits
    h,
    k,  # [BLOCK_N, BLOCK_D] in DTYPE
    column,  # [BLOCK_N] int64, their positions
    ok_n,  # [BLOCK_N] bool
    offs_n,  # [BLOCK_N]
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What columns receive from rows in the heads from ``h`` on, weighed, and which of it counts: [HEADS * ROWS, BLOCK_N]."""
    query_ptr, _, _, cos_ptr, sin_ptr, _, _, _, weight_ptr, pair_ptr = sample
    scale, _, N, first_row, _ = sizes
    head, r, row, real, weight = rows
    q_offs = (h + head) * strides[0][1] + (row - first_row) * strides[0][2]
    q = load_rows(query_ptr, q_offs, cos_ptr, sin_ptr, row * strides[3][1], real, D, BLOCK_D, DTYPE)
    p = row_products(q, k) * scale
    if lse is not None:
        p = tl.exp2((p - lse[:, None]) * LOG2E)
    if weight_ptr is not None:
        p = p * weight[:, None]
    ok = real[:, None] & ok_n[None, :]
    if pair_ptr is not None:
        pairs = pair_ptr + r.to(tl.int64)[:, None] * N + offs_n[None, :]
        p = p * tl.load(pairs, mask=ok, other=0.0)
    if CAUSAL:
        ok = ok & (row[:, None] >= column[None, :])
    return p, ok


@triton.jit
def _over_rows(x, ROW_REDUCE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Sum or maximum over the rows of each head: [HEADS * ROWS, BLOCK_N] -> [HEADS, BLOCK_N]."""
    x = tl.reshape(x, (HEADS, ROWS, x.shape[1]))
    return max_over(x, 1) if ROW_REDUCE == "max" else tl.sum(x, 1)


@triton.jit
def _head_scores(
    sample,
    sizes,
    strides,
    rows,  # None where there are more than one tile of them
    lse,
    h,
    k,
    column,
    ok_n,
    offs_n,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_REDUCE: tl.constexpr,
    LSE_BY_POSITION: tl.constexpr,
    tile,  # D, CAUSAL, DTYPE, BLOCK_D
):
    """Reduce each of HEADS heads over the rows: [HEADS, BLOCK_N] float32."""
    BLOCK_N: tl.constexpr = k.shape[0]
    NEUTRAL: tl.constexpr = float("-inf") if ROW_REDUCE == "max" else 0.0
    reduced = tl.full((HEADS, BLOCK_N), NEUTRAL, tl.float32)
    total = tl.zeros((HEADS, ROWS), tl.float32)
    seen = tl.zeros((HEADS, BLOCK_N), tl.int32)
    for first in range(0, ROWS if rows is not None else sizes[1], ROWS):  # once: no loop at all
        these = rows
        sums = lse
        if rows is None:
            these = _rows(sample, sizes, first, G, HEADS, ROWS)
            if sample[1] is not None:
                sums = _log_sums(sample, sizes, strides, these, h, LSE_BY_POSITION)
        p, ok = _products(sample, sizes, strides, these, sums, h, k, column, ok_n, offs_n, *tile)
        x = _over_rows(tl.where(ok, p, NEUTRAL), ROW_REDUCE, HEADS, ROWS)
        if ROW_REDUCE == "max":
            reduced = max_with_nan(reduced, x)
            seen = tl.maximum(seen, _over_rows(ok.to(tl.int32), "sum", HEADS, ROWS))
        else:
            reduced += x
        total += tl.reshape(these[4], (HEADS, ROWS))
    if ROW_REDUCE == "max":
        reduced = tl.where(seen > 0, reduced, 0.0)
    if ROW_REDUCE == "mean":
        weights = tl.sum(total, 1)[:, None]
        reduced = tl.where(weights > 0.0, reduced / tl.where(weights > 0.0, weights, 1.0), 0.0)
    return reduced


@triton.jit
def score_part(
    sample,
    sizes,
    strides,
    part_ptr,  # [H, N], this sample's, where heads stay apart
    offs_n,  # [BLOCK_N] columns
    h_first,  # KV heads
    h_last,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_TILE: tl.constexpr,  # all rows of all G heads are one
    HEAD_REDUCE: tl.constexpr,
    ROW_REDUCE: tl.constexpr,
    LSE_BY_POSITION: tl.constexpr,
    tile,  # D, CAUSAL, DTYPE, BLOCK_D
):
    """What a tile of columns receives in the query heads of some KV heads: joined, [BLOCK_N], unless they stay apart."""
    _, lse_ptr, key_ptr, cos_ptr, sin_ptr, _, columns_ptr, key_mask_ptr, _, _ = sample
    N, length = sizes[2], sizes[4]
    D: tl.constexpr = tile[0]
    DTYPE: tl.constexpr = tile[2]
    BLOCK_D: tl.constexpr = tile[3]
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    column = tl.load(columns_ptr + offs_n, mask=offs_n < N, other=-1)
    ok_n = (column >= 0) & (column < length)
    column = tl.where(ok_n, column, 0)
    if key_mask_ptr is not None:
        ok_n = ok_n & (tl.load(key_mask_ptr + column, mask=ok_n, other=0) != 0)
    rows = _rows(sample, sizes, 0, G, HEADS, ROWS) if ONE_TILE else None
    lse = None
    if ONE_TILE and lse_ptr is not None:
        lse = _log_sums(sample, sizes, strides, rows, h_first * G, LSE_BY_POSITION)
    joined = tl.full((BLOCK_N,), float("-inf") if HEAD_REDUCE == "max" else 0.0, tl.float32)
    for h_kv in range(h_first, h_last):
        k_offs = h_kv * strides[1][1] + column * strides[1][2]
        k = load_rows(key_ptr, k_offs, cos_ptr, sin_ptr, column * strides[3][1], ok_n, D, BLOCK_D, DTYPE)
        sums = lse
        if lse is not None:  # those of the next head are on their way while this one is at work
            ahead = tl.minimum(h_kv + 1, h_last - 1) * G
            lse = _log_sums(sample, sizes, strides, rows, ahead, LSE_BY_POSITION)
        for g in range(0, G, HEADS):
            h = h_kv * G + g
            x = _head_scores(
                sample,
                sizes,
                strides,
                rows,
                sums,
                h,
                k,
                column,
                ok_n,
                offs_n,
                *(G, HEADS, ROWS, ROW_REDUCE, LSE_BY_POSITION, tile),
            )
            head = tl.arange(0, HEADS)
            real = (g + head < G)[:, None]
            if HEAD_REDUCE == "none":
                x_offs = (h + head)[:, None] * N + offs_n[None, :]
                tl.store(part_ptr + x_offs, x, mask=real & (offs_n < N)[None, :])
            elif HEAD_REDUCE == "max":
                joined = max_with_nan(joined, max_over(tl.where(real, x, float("-inf")), 0))
            else:
                joined += tl.sum(x, 0)
    return joined


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
    part_ptr,  # [parts, N] float32, this sample's
    ranks,  # of all parts, the first ``parts`` of which are joined; None = they are as many
    offs,
    N,
    parts,
    REDUCE: tl.constexpr,
):
    """Sum or maximum over the parts at columns ``offs``, always in the same order: float32."""
    other: tl.constexpr = float("-inf") if REDUCE == "max" else 0.0
    acc = tl.full(offs.shape, other, tl.float32)
    for first in range(0, parts, PARTS_AT_ONCE):
        part = first + tl.arange(0, PARTS_AT_ONCE)
        ok = part < parts
        if ranks is not None:
            at = tl.arange(0, ranks.shape[0])
            part = tl.sum(tl.where(ranks[:, None] == part[None, :], at[:, None], 0), 0)
        x_offs = part.to(tl.int64)[:, None] * N + offs[None, :]
        mask = ok[:, None] & (offs < N)[None, :]
        x = tl.load(part_ptr + x_offs, mask=mask, other=other, cache_modifier=".cg")
        acc = max_with_nan(acc, max_over(x, 0)) if REDUCE == "max" else acc + tl.sum(x, 0)
    return acc


@triton.jit
def finish(
    score,
    offs,
    N,
    scores_ptr,
    chosen,
    work,
    ENTERS: tl.constexpr,
    JOINED: tl.constexpr,
    HEAD_REDUCE: tl.constexpr,
):
    """Write the scores of columns, and what they compete by."""
    if HEAD_REDUCE == "mean":
        score = score / JOINED
    tl.store(scores_ptr + offs, score, mask=offs < N)
    if ENTERS:
        enter_columns(chosen, work, score, offs)
