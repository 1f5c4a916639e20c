"""Row gather of many tensors in place, in one launch: x_t[b, h, k, :] = x_t[b, h, index[b, k], :] where that is a row.

Memory bound: each row that moves is read once and written once; a row that stays is not touched.
A row may be the source of one move and the target of another, so the moves of one tensor, sample, head and block of
columns are a chain, which one program walks from the left. The index ascends, so index[k] >= k: a row that this step
writes can be a source of this step (hence the barrier) but of no later one.
Tile: BLOCK_K rows x BLOCK_D columns of one head of one tensor.
Grid: (sum over tensors of heads * cdiv(D, BLOCK_D), B).
"""

import triton
import triton.language as tl

from vlmprune.triton_kernels._rows import decoded, launch_grouped, pick, place_of

BLOCK_BYTES = 128  # of columns: whole cache lines, and enough chains where heads are few
BLOCK_K = 64


@triton.jit(do_not_specialize=["K"])
def _compact_kv_kernel(
    caches,  # per group, a tuple of pointers to x [B, heads, S, D]
    strides,  # per group, (batch, head, sequence) strides of x
    lengths,  # per group, the code of S
    first_units,  # per group, the first program of axis 0 that works on it, and one past the last
    index_ptr,  # [B, K] int64, contiguous, ascending in each row
    K,
    COUNTS: tl.constexpr,  # per group: tensors, heads, columns, columns in a tile
    HEADS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    for i in tl.static_range(len(COUNTS)):
        if (pid >= first_units[i]) & (pid < first_units[i + 1]):
            tensor, h, offs_d = place_of(pid - first_units[i], HEADS[i], WIDTHS[i], BLOCKS[i])
            x_ptr = pick(caches[i], tensor, COUNTS[i]) + b * strides[i][0] + h * strides[i][1]
            for first in range(0, K, BLOCK_K):
                offs_k = first + tl.arange(0, BLOCK_K).to(tl.int64)
                row = tl.load(index_ptr + b * K + offs_k, mask=offs_k < K, other=-1)  # [BLOCK_K]
                moves = (row > offs_k) & (row < decoded(lengths[i]))
                mask = moves[:, None] & (offs_d < WIDTHS[i])[None, :]
                from_offs = tl.where(moves, row, 0) * strides[i][2]
                x = tl.load(x_ptr + from_offs[:, None] + offs_d[None, :], mask=mask)  # [BLOCK_K, BLOCK_D]
                tl.debug_barrier()  # a row of this tile may be both read and written, by different threads
                tl.store(x_ptr + (offs_k * strides[i][2])[:, None] + offs_d[None, :], x, mask=mask)


def compact_kv(caches, index):
    """Group by layout, launch. Arguments were validated by vlmprune.ops.compact_kv."""
    if index.numel():
        items = [(x,) for x in caches if x.numel()]
        launch_grouped(_compact_kv_kernel, items, index, BLOCK_BYTES, BLOCK_K)
