"""Density-peak clusters: spread_i = mean of the k smallest d_ij^2, score_i = log(gap_i) - spread_i, centres = best scores.

d is L2 / sqrt(D), summed from differences: the shorter |x|^2 + |y|^2 - 2 x.y loses near tokens to rounding. Density is
exp(-spread), so the score orders tokens as density * gap does, without underflow.
Bound: N^2 D differences out of cache. The k-th smallest distance is found by radix rounds on its bits, exactly.
Spread: tile BLOCK_N tokens x BLOCK_D columns, grid (N, B). Score: CHUNK tokens, (N, B). Assignment: CHUNK, (cdiv(N, CHUNK), B).
No atomics; a sort on the device picks the centres.
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import as_bytes
from vlmprune.triton_kernels.select_topk import REGISTERS

BLOCK_N = 32
ROW_BYTES = 256  # of a tile
CHUNK = 512
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a token of gap 0 still comes before padding, at -inf


@triton.jit
def _bits(row_ptr, offs, N):
    """Numbers >= 0 as uint32, whose order is theirs."""
    return tl.load(row_ptr + offs, mask=offs < N, other=float("inf")).to(tl.uint32, bitcast=True)


@triton.jit
def _sum_of_smallest(row_ptr, k, N, CHUNK: tl.constexpr):
    """Sum of the k smallest of N numbers >= 0: radix rounds find the k-th, then everything below it is added."""
    bins = tl.arange(0, 256)
    kth = tl.zeros((), tl.uint32)
    known = tl.zeros((), tl.uint32)  # the bits of the k-th decided so far
    equal = k  # how many of the k are not below what is known of the k-th
    for step in range(4):
        shift = (24 - 8 * step + tl.zeros((), tl.int32)).to(tl.uint32)
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, N, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            bits = _bits(row_ptr, offs, N)
            digit = ((bits >> shift) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=(offs < N) & ((bits & known) == kth))
        digit_k = tl.sum((tl.cumsum(counts, 0) < equal).to(tl.int32), 0)
        equal -= tl.sum(tl.where(bins < digit_k, counts, 0), 0)
        kth = kth | (digit_k.to(tl.uint32) << shift)
        known = known | (tl.full((), 255, tl.uint32) << shift)
    below = tl.zeros((), tl.float32)
    for start in range(0, N, CHUNK):
        bits = _bits(row_ptr, start + tl.arange(0, CHUNK), N)
        below += tl.sum(tl.where(bits < kth, bits.to(tl.float32, bitcast=True), 0.0), 0)
    return below + equal.to(tl.float32) * kth.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["neighbors"])
def _spread_kernel(
    x_ptr,  # [B, N, D], last dim contiguous
    mask_ptr,  # [B, N] uint8, contiguous, or None
    square_ptr,  # [B, N, N] float32, contiguous: d^2, inf at padding
    spread_ptr,  # [B, N] float32, contiguous
    farthest_ptr,  # [B, N] float32, contiguous: the largest d^2 of each row
    N,
    D,
    neighbors,
    stride_xb,
    stride_xn,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x_ptr += b * stride_xb
    square_ptr += (b * N + i) * N
    row_i = x_ptr + i.to(tl.int64) * stride_xn
    real_i = tl.full((), 1, tl.int32)
    if mask_ptr is not None:
        real_i = tl.load(mask_ptr + b * N + i).to(tl.int32)
    count = tl.zeros((), tl.int32)
    farthest = tl.zeros((), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        real = (offs_n < N).to(tl.int32) * real_i
        if mask_ptr is not None:
            real = real * tl.load(mask_ptr + b * N + offs_n, mask=offs_n < N, other=0).to(tl.int32)
        rows = x_ptr + offs_n.to(tl.int64) * stride_xn
        total = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, D, BLOCK_D):
            offs_d = first + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            x_i = tl.load(row_i + offs_d, mask=offs_d < D * real_i, other=0.0).to(tl.float32)  # [BLOCK_D]
            x = tl.load(
                rows[:, None] + offs_d[None, :], mask=(real > 0)[:, None] & mask_d[None, :], other=0.0
            )
            apart = x.to(tl.float32) - x_i[None, :]
            total += tl.sum(apart * apart, 1)  # [BLOCK_N]
        square = tl.where(real > 0, total / D, float("inf"))
        tl.store(square_ptr + offs_n, square, mask=offs_n < N)
        farthest = tl.maximum(farthest, tl.max(tl.where(real > 0, square, 0.0), 0))
        count += tl.sum(real, 0)
    tl.debug_barrier()  # the row is read back by other threads than wrote it

    k = tl.maximum(tl.minimum(count, neighbors), 1)
    spread = _sum_of_smallest(square_ptr, k, N, CHUNK) / k
    tl.store(spread_ptr + b * N + i, spread)  # inf for padding: no token is less dense
    tl.store(farthest_ptr + b * N + i, farthest)


@triton.jit
def _score_kernel(
    square_ptr,  # [B, N, N] float32, contiguous
    spread_ptr,  # [B, N] float32, contiguous
    farthest_ptr,  # [B, N] float32, contiguous
    mask_ptr,  # [B, N] uint8, contiguous, or None
    score_ptr,  # [B, N] float32, contiguous
    N,
    CHUNK: tl.constexpr,
):
    i, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mine = tl.load(spread_ptr + b * N + i)
    gap = tl.full((), float("inf"), tl.float32)
    farthest = tl.zeros((), tl.float32)
    denser_ones = tl.zeros((), tl.int32)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        mask = offs < N
        spread = tl.load(spread_ptr + b * N + offs, mask=mask, other=float("inf"))
        denser = mask & ((spread < mine) | ((spread == mine) & (offs < i)))
        square = tl.load(square_ptr + (b * N + i) * N + offs, mask=denser, other=float("inf"))
        gap = tl.minimum(gap, tl.min(square, 0))
        denser_ones += tl.sum(denser.to(tl.int32), 0)
        farthest = tl.maximum(farthest, tl.max(tl.load(farthest_ptr + b * N + offs, mask=mask, other=0.0), 0))
    gap = tl.where(denser_ones > 0, gap, farthest)  # still squared: log(gap) = log(gap^2) / 2
    apart = (gap > 0.0) & (gap < float("inf"))
    score = tl.where(apart, 0.5 * tl.log(tl.where(apart, gap, 1.0)) - mine, LOWEST)
    if mask_ptr is not None:
        score = tl.where(tl.load(mask_ptr + b * N + i) != 0, score, float("-inf"))
    tl.store(score_ptr + b * N + i, score)


@triton.jit(do_not_specialize=["clusters"])
def _assign_kernel(
    square_ptr,  # [B, N, N] float32, contiguous
    centers_ptr,  # [B, clusters] int64, contiguous, -1 = none
    mask_ptr,  # [B, N] uint8, contiguous, or None
    assignment_ptr,  # [B, N] int64, contiguous
    N,
    clusters,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mask = offs < N
    nearest = tl.full((CHUNK,), float("inf"), tl.float32)
    assigned = tl.full((CHUNK,), -1, tl.int64)
    for c in range(0, clusters):
        center = tl.load(centers_ptr + b * clusters + c)
        if center >= 0:
            # the centre's row, which is contiguous, for its column: distances are symmetric to the bit
            square = tl.load(square_ptr + (b * N + center) * N + offs, mask=mask, other=float("inf"))
            # a centre belongs to itself, even beside its double
            square = tl.where(offs == center, -1.0, square)
            nearer = square < nearest
            assigned = tl.where(nearer, c, assigned)
            nearest = tl.where(nearer, square, nearest)
    if mask_ptr is not None:
        assigned = tl.where(tl.load(mask_ptr + b * N + offs, mask=mask, other=0) != 0, assigned, -1)
    tl.store(assignment_ptr + b * N + offs, assigned, mask=mask)


def cluster_dpc(features, clusters, neighbors, mask):
    """Allocate, launch, sort the scores in between. Arguments were validated by vlmprune.ops.cluster_dpc."""
    (B, N, D), device = features.shape, features.device
    if B * N * clusters == 0:
        empty = torch.full((B, N), -1, dtype=torch.int64, device=device)
        return empty, empty.new_full((B, clusters), -1)
    mask_bytes = as_bytes(mask)
    square = torch.empty((B, N, N), dtype=torch.float32, device=device)
    spread, farthest, score = torch.empty((3, B, N), dtype=torch.float32, device=device).unbind()
    tiles = {"BLOCK_N": BLOCK_N, "BLOCK_D": ROW_BYTES // features.element_size(), "CHUNK": CHUNK}
    args = (features, mask_bytes, square, spread, farthest, N, D, neighbors, *features.stride()[:2])
    _spread_kernel[(N, B)](*args, num_warps=4, **tiles, **REGISTERS)
    _score_kernel[(N, B)](square, spread, farthest, mask_bytes, score, N, CHUNK=CHUNK, num_warps=4)
    best = score.sort(dim=1, descending=True, stable=True)
    centers = torch.where(best.values > float("-inf"), best.indices, -1)[:, :clusters].contiguous()
    assignment = torch.empty((B, N), dtype=torch.int64, device=device)
    args = (square, centers, mask_bytes, assignment, N, clusters)
    _assign_kernel[(triton.cdiv(N, CHUNK), B)](*args, CHUNK=CHUNK, num_warps=4)
    return assignment, centers
