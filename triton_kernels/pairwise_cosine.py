"""Cosines of all pairs: cos[b, m, n] = x[b, m] . x[b, n] / |x[b, m]| / |x[b, n]|, symmetric to the bit, 1 on the diagonal.

Compute bound: products on tensor cores, float32 sums. A tile and its mirror image are one program's work.
Tile: BLOCK x BLOCK pairs, D in pieces of BLOCK_D. Grid: (cdiv(N, BLOCK), cdiv(N, BLOCK), B), half of it idle.
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import dot_dtype, registers, row_products

BLOCK = 64
ROW_BYTES = 128  # of an operand tile
MIN_NORM, MAX_NORM = 1e-15, 1e15  # beyond, products leave the range of float32


@triton.jit
def cosine_tile(
    row_m,  # [BLOCK] pointers to rows, of which those of inverse 0 are not read
    row_n,
    inverse_m,  # [BLOCK] float32, 1 / norm, 0 = takes no part
    inverse_n,
    D,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Cosines [BLOCK, BLOCK] in [-1, 1] of two tiles of rows."""
    dots = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        m = tl.load(
            row_m[:, None] + offs_d[None, :], mask=(inverse_m > 0)[:, None] & mask_d[None, :], other=0.0
        )
        n = tl.load(
            row_n[:, None] + offs_d[None, :], mask=(inverse_n > 0)[:, None] & mask_d[None, :], other=0.0
        )
        dots += row_products(m.to(DTYPE), n.to(DTYPE))
    cos = dots * (inverse_m[:, None] * inverse_n[None, :])
    return tl.minimum(tl.maximum(cos, -1.0), 1.0)


@triton.jit
def _cosine_kernel(
    x_ptr,  # [B, N, D], last dim contiguous
    inverse_ptr,  # [B, N] float32, 1 / norm, 0 = takes no part; contiguous
    cos_ptr,  # [B, N, N] float32, contiguous
    N,
    D,
    stride_xb,
    stride_xn,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_m, pid_n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if pid_m > pid_n:
        return  # the mirrored tile writes both
    offs_m = pid_m * BLOCK + tl.arange(0, BLOCK)
    offs_n = pid_n * BLOCK + tl.arange(0, BLOCK)
    inverse_m = tl.load(inverse_ptr + b * N + offs_m, mask=offs_m < N, other=0.0)
    inverse_n = tl.load(inverse_ptr + b * N + offs_n, mask=offs_n < N, other=0.0)
    row_m = x_ptr + b * stride_xb + offs_m.to(tl.int64) * stride_xn
    row_n = x_ptr + b * stride_xb + offs_n.to(tl.int64) * stride_xn
    cos = cosine_tile(row_m, row_n, inverse_m, inverse_n, D, DTYPE, BLOCK, BLOCK_D)  # [BLOCK, BLOCK]
    if pid_m == pid_n:
        cos = (cos + tl.trans(cos)) * 0.5  # two tokens nearest to each other must tie to the last bit
    itself = offs_m[:, None] == offs_n[None, :]
    cos = tl.where(itself, (inverse_m > 0).to(tl.float32)[:, None], cos)
    cos_ptr += b * N * N
    out = cos_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out, cos, mask=(offs_m < N)[:, None] & (offs_n < N)[None, :])
    mirrored = cos_ptr + offs_n.to(tl.int64)[:, None] * N + offs_m[None, :]
    tl.store(mirrored, tl.trans(cos), mask=(offs_n < N)[:, None] & (offs_m < N)[None, :])


def inverse_norm(features, mask):
    """1 / norm of each token ``[B, N]`` float32, 0 = it takes no part: padding, or a norm that is none."""
    norm = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)
    ok = (norm > MIN_NORM) & (norm < MAX_NORM)
    ok = ok if mask is None else ok & mask
    return torch.where(ok, 1.0 / norm, 0.0)


def tiles(features):
    """Tile of a product of rows of ``features``. Split for three TF32 products, operands are held in registers: half as many."""
    split = features.element_size() == 4
    return {
        "DTYPE": dot_dtype(features),
        "BLOCK": BLOCK,
        "BLOCK_D": ROW_BYTES // features.element_size() // (2 if split else 1),
        "num_warps": 8,
    }


def pairwise_cosine(features, mask):
    """Cosines ``[B, N, N]``, and which tokens take part in them ``[B, N]``."""
    B, N, D = features.shape
    inverse = inverse_norm(features, mask)
    cos = torch.empty((B, N, N), dtype=torch.float32, device=features.device)
    blocks = triton.cdiv(N, BLOCK)
    _cosine_kernel[(blocks, blocks, B)](
        features, inverse, cos, N, D, *features.stride()[:2], **tiles(features), **registers(255)
    )
    return cos, inverse > 0
