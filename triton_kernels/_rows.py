"""Tensors as the kernels that move rows see them: [B, heads, S, D], grouped by layout.

Tensors of one dtype, shape and stride form a group (all keys and values of a model are one): a group shares its
strides and its code, and its pointers travel by value in the launch, so no pointer table is copied to the device.
"""

import torch
import triton
import triton.language as tl

MAX_TENSORS = 64  # in one launch; more tensors take more launches
_NATIVE = {torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8}
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _plain(x):
    """View dtypes that Triton does not load and store as they are (bool, float8, complex64) as integers."""
    return x if x.dtype in _NATIVE else x.view(_WORD[x.element_size()])


def _layout(x):
    """(heads, D, S, (batch, head, sequence strides)) of a rank 2, 3 or 4 tensor; batch stride 0 = one for all samples."""
    batch = x.stride(0) if x.shape[0] > 1 else 0
    if x.ndim == 4:
        return x.shape[1], x.shape[3], x.shape[2], (batch, x.stride(1), x.stride(2))
    return 1, x.shape[2] if x.ndim == 3 else 1, x.shape[1], (batch, 0, x.stride(1))


def grouped(items, block_bytes):
    """Arguments of a launch that works on ``items``, tuples of tensors of which the first has the layout of interest.

    A unit is one block of columns, at most ``block_bytes`` wide, of one head of one item.

    Returns:
        (pointers, strides, lengths, first_units, meta): pointers[i] holds per group a tuple of the i-th tensors;
        strides and lengths one entry a group; first_units the first unit of each group and one past the last.
    """
    groups = {}
    for item in items:
        groups.setdefault((item[0].dtype, *_layout(item[0])), []).append([_plain(x) for x in item])
    dtypes, heads, widths, lengths, strides = zip(*groups, strict=True)
    counts = tuple(len(members) for members in groups.values())
    blocks = tuple(
        min(triton.next_power_of_2(D), block_bytes // dtype.itemsize)
        for D, dtype in zip(widths, dtypes, strict=True)
    )
    first_units = [0]
    for count, n_heads, D, block in zip(counts, heads, widths, blocks, strict=True):
        first_units.append(first_units[-1] + count * n_heads * triton.cdiv(D, block))
    by_group = [zip(*members, strict=True) for members in groups.values()]
    pointers = tuple(zip(*by_group, strict=True))
    meta = dict(COUNTS=counts, HEADS=heads, WIDTHS=widths, BLOCKS=blocks)
    return pointers, strides, lengths, tuple(first_units), meta


@triton.jit
def pick(pointers, at, COUNT: tl.constexpr):
    """pointers[at] for an ``at`` known at run time."""
    picked = pointers[0]
    for i in tl.static_range(1, COUNT):
        picked = tl.where(at == i, pointers[i], picked)
    return picked


@triton.jit
def place_of(unit, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tensor of the group, head as int64, columns [BLOCK_D]) of a unit."""
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    head = (unit // column_blocks % HEADS).to(tl.int64)
    return unit // (HEADS * column_blocks), head, unit % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
