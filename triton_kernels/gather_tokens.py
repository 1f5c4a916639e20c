"""Row gather of many tensors in one launch: out_t[b, h, k, :] = x_t[b, h, index[b, k], :], zeros where index is -1.

Memory bound: each kept row is read once and written once.
Tensors of one dtype, shape and stride form a group (all keys and values of a model are one): a group shares its
strides and its code, and its pointers travel by value in the launch, so no pointer table is copied to the device.
Tile: BLOCK_K kept rows x BLOCK_D columns of one head of one tensor.
Grid: (sum over tensors of heads * cdiv(D, BLOCK_D), cdiv(K, BLOCK_K), B).
"""

import torch
import triton
import triton.language as tl

MAX_TENSORS = 64  # pointers in one launch; more tensors take more launches
MAX_BLOCK_D = 256
BLOCK_K = 16
_NATIVE = {torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8}
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _copy_unit(
    unit,  # which (tensor of the group, head, block of columns)
    sources,
    outs,
    strides,
    row,  # [BLOCK_K] int64, -1 = zeros
    offs_k,
    b,
    K,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tensor = unit // (HEADS * column_blocks)
    source, out = sources[0], outs[0]
    for i in tl.static_range(1, COUNT):
        source = tl.where(tensor == i, sources[i], source)
        out = tl.where(tensor == i, outs[i], out)

    h = (unit // column_blocks % HEADS).to(tl.int64)
    offs_d = unit % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    x_offs = b * strides[0] + h * strides[1] + tl.maximum(row, 0) * strides[2]
    mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
    x = tl.load(source + x_offs[:, None] + offs_d[None, :], mask=mask & (row >= 0)[:, None], other=0)
    out_offs = ((b * HEADS + h) * K + offs_k) * D
    tl.store(out + out_offs[:, None] + offs_d[None, :], x, mask=mask)  # [BLOCK_K, BLOCK_D]


@triton.jit
def _gather_tokens_kernel(
    sources,  # per group, a tuple of pointers to x [B or 1, heads, S, D]
    outs,  # per group, a tuple of pointers to out [B, heads, K, D], contiguous
    strides,  # per group, (batch, head, sequence) strides of x; batch 0 = one x for the whole batch
    first_units,  # per group, the first program of axis 0 that works on it, and one past the last
    index_ptr,  # [B, K] int64, contiguous
    K,
    COUNTS: tl.constexpr,  # per group: tensors, heads, columns, columns in a tile
    HEADS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(index_ptr + b * K + offs_k, mask=offs_k < K, other=-1)  # [BLOCK_K]
    for i in tl.static_range(len(COUNTS)):
        if (pid >= first_units[i]) & (pid < first_units[i + 1]):
            _copy_unit(
                pid - first_units[i],
                sources[i],
                outs[i],
                strides[i],
                row,
                offs_k,
                b,
                K,
                COUNTS[i],
                HEADS[i],
                WIDTHS[i],
                BLOCKS[i],
            )


def _plain(x):
    """View dtypes that Triton does not load and store as they are (bool, float8, complex64) as integers."""
    return x if x.dtype in _NATIVE else x.view(_WORD[x.element_size()])


def _layout(x, B):
    """(heads, D, batch stride, head stride, sequence stride) of a rank 2, 3 or 4 tensor."""
    batch = x.stride(0) if x.shape[0] == B else 0
    if x.ndim == 4:
        return x.shape[1], x.shape[3], batch, x.stride(1), x.stride(2)
    return 1, x.shape[2] if x.ndim == 3 else 1, batch, 0, x.stride(1)


def _launch(pairs, index):
    """One launch for up to MAX_TENSORS (source, out) pairs."""
    B, K = index.shape
    groups = {}
    for x, out in pairs:
        groups.setdefault((x.dtype, *_layout(x, B)), []).append((_plain(x), _plain(out)))
    heads, widths = [key[1] for key in groups], [key[2] for key in groups]
    blocks = [min(triton.next_power_of_2(D), MAX_BLOCK_D) for D in widths]
    counts = [len(members) for members in groups.values()]
    first_units = [0]
    for count, n_heads, D, block in zip(counts, heads, widths, blocks, strict=True):
        first_units.append(first_units[-1] + count * n_heads * triton.cdiv(D, block))
    _gather_tokens_kernel[(first_units[-1], triton.cdiv(K, BLOCK_K), B)](
        tuple(tuple(x for x, _ in members) for members in groups.values()),
        tuple(tuple(out for _, out in members) for members in groups.values()),
        tuple(key[3:] for key in groups),
        tuple(first_units),
        index,
        K,
        COUNTS=tuple(counts),
        HEADS=tuple(heads),
        WIDTHS=tuple(widths),
        BLOCKS=tuple(blocks),
        BLOCK_K=BLOCK_K,
        num_warps=4,
    )


def gather_tokens(tensors, index):
    """Allocate, group by layout, launch. Arguments were validated by vlmprune.ops.gather_tokens."""
    B, K = index.shape
    shapes = [(B, *x.shape[1:-2], K, x.shape[-1]) if x.ndim > 2 else (B, K) for x in tensors]
    outs = [x.new_empty(shape) for x, shape in zip(tensors, shapes, strict=True)]
    pairs = [(x, out) for x, out in zip(tensors, outs, strict=True) if out.numel()]
    index = index.contiguous()
    for first in range(0, len(pairs), MAX_TENSORS):
        _launch(pairs[first : first + MAX_TENSORS], index)
    return outs
