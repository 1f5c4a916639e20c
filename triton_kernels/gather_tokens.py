"""Row gather of many tensors in one launch: out_t[b, h, k, :] = x_t[b, h, index[b, k], :], zeros where that is no row.

Memory bound: each kept row is read once and written once.
Tile: BLOCK_K kept rows x BLOCK_D columns of one head of one tensor.
Grid: (sum over tensors of heads * cdiv(D, BLOCK_D), cdiv(K, BLOCK_K), B).
"""

import triton
import triton.language as tl

from vlmprune.triton_kernels._device import let_next_begin, wait_for_inputs
from vlmprune.triton_kernels._rows import decoded, launch_grouped, pick, place_of

BLOCK_BYTES = 512  # of columns: a warp's 32 pieces of 16 bytes
BLOCK_K = 16


@triton.jit(do_not_specialize=["K"])
def _gather_tokens_kernel(
    sources,  # per group, a tuple of pointers to x [B or 1, heads, S, D]
    outs,  # per group, a tuple of pointers to out [B, heads, K, D], contiguous
    strides,  # per group, (batch, head, sequence) strides of x; batch 0 = one x for the whole batch
    lengths,  # per group, the code of S
    first_units,  # per group, the first program of axis 0 that works on it, and one past the last
    index_ptr,  # [B, K] int64, contiguous
    K,
    COUNTS: tl.constexpr,  # per group: tensors, heads, columns, columns in a tile
    HEADS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_begin(PDL)
    pid, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(index_ptr + b * K + offs_k, mask=offs_k < K, other=-1)  # [BLOCK_K]
    for i in tl.static_range(len(COUNTS)):
        if (pid >= first_units[i]) & (pid < first_units[i + 1]):
            D: tl.constexpr = WIDTHS[i]
            tensor, h, offs_d = place_of(pid - first_units[i], HEADS[i], D, BLOCKS[i])
            source, out = pick(sources[i], tensor, COUNTS[i]), pick(outs[i], tensor, COUNTS[i])
            is_row = (row >= 0) & (row < decoded(lengths[i]))
            x_offs = b * strides[i][0] + h * strides[i][1] + tl.where(is_row, row, 0) * strides[i][2]
            mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
            x = tl.load(source + x_offs[:, None] + offs_d[None, :], mask=mask & is_row[:, None], other=0)
            out_offs = ((b * HEADS[i] + h) * K + offs_k) * D
            tl.store(out + out_offs[:, None] + offs_d[None, :], x, mask=mask)  # [BLOCK_K, BLOCK_D]


def gather_tokens(tensors, index):
    """Allocate, group by layout, launch. Arguments were validated by vlmprune.ops.gather_tokens."""
    B, K = index.shape
    shapes = [(B, *x.shape[1:-2], K, x.shape[-1]) if x.ndim > 2 else (B, K) for x in tensors]
    outs = [x.new_empty(shape) for x, shape in zip(tensors, shapes, strict=True)]
    pairs = [(x, out) for x, out in zip(tensors, outs, strict=True) if out.numel()]
    launch_grouped(_gather_tokens_kernel, pairs, index, BLOCK_BYTES, BLOCK_K, triton.cdiv(K, BLOCK_K))
    return outs
