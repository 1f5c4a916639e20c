"""Cluster sums and means: out[b, c, :] = sum of w[b, n] x[b, n, :] over the tokens n assigned to c; "mean" divides by sum w.

Memory bound: each assigned row is read once, rows of other clusters not at all. Every program reads all assignments, CHUNK
at a time, and looks into a chunk only if its cluster is there: with many clusters (ToMe) it hardly ever is.
Tile: BLOCK_N tokens x BLOCK_D columns, added in position order tile by tile: no atomics, the bits repeat.
Grid: (clusters, cdiv(D, BLOCK_D), B).
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels.select_topk import REGISTERS

CHUNK = 512
BLOCK_N = 32
MAX_BLOCK_D = 128


@triton.jit(do_not_specialize=["N", "clusters"])
def _merge_tokens_kernel(
    x_ptr,  # [B, N, D], last dim contiguous
    assignment_ptr,  # [B, N] int64, contiguous
    weights_ptr,  # [B, N], contiguous, or None
    out_ptr,  # [B, clusters, D], contiguous
    N,
    D,
    clusters,
    stride_xb,
    stride_xn,
    MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cluster, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    merged = tl.zeros((BLOCK_D,), tl.float32)
    total = tl.zeros((), tl.float32)
    for chunk in range(0, N, CHUNK):
        offs = chunk + tl.arange(0, CHUNK)
        nearby = tl.load(assignment_ptr + b * N + offs, mask=offs < N, other=-1)
        if tl.sum((nearby == cluster).to(tl.int32), 0) > 0:
            for start in range(chunk, tl.minimum(chunk + CHUNK, N), BLOCK_N):
                offs_n = start + tl.arange(0, BLOCK_N)
                assigned = tl.load(assignment_ptr + b * N + offs_n, mask=offs_n < N, other=-1)
                mine = assigned == cluster  # [BLOCK_N]
                w = mine.to(tl.float32)
                if weights_ptr is not None:
                    w = tl.load(weights_ptr + b * N + offs_n, mask=mine, other=0.0).to(tl.float32)
                rows = x_ptr + b * stride_xb + offs_n.to(tl.int64) * stride_xn
                x = tl.load(rows[:, None] + offs_d[None, :], mask=mine[:, None] & mask_d[None, :], other=0.0)
                merged += tl.sum(x.to(tl.float32) * w[:, None], 0)
                total += tl.sum(w, 0)
    if MEAN:
        merged = tl.where(total != 0.0, merged / tl.where(total != 0.0, total, 1.0), 0.0)
    tl.store(out_ptr + (b * clusters + cluster) * D + offs_d, merged, mask=mask_d)


def merge_tokens(features, assignment, clusters, mode, weights):
    """Allocate and launch. Arguments were validated by vlmprune.ops.merge_tokens."""
    B, N, D = features.shape
    out = torch.empty((B, clusters, D), dtype=features.dtype, device=features.device)
    if out.numel() == 0:
        return out
    BLOCK_D = min(triton.next_power_of_2(D), MAX_BLOCK_D)
    weights = None if weights is None else weights.contiguous()
    args = (features, assignment.contiguous(), weights, out, N, D, clusters, *features.stride()[:2])
    tiles = {"CHUNK": CHUNK, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": 4}
    grid = (clusters, triton.cdiv(D, BLOCK_D), B)
    _merge_tokens_kernel[grid](*args, MEAN=mode == "mean", **tiles, **REGISTERS)
    return out
