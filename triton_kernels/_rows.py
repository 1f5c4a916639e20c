"""Tensors as the kernels that move rows see them: [B, heads, S, D], grouped by layout.

Tensors of one dtype, shape and stride form a group (all keys and values of a model are one): a group shares its
strides and its code, and its pointers travel by value in the launch, so no pointer table is copied to the device.
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._launch import launch

MAX_TENSORS = 64  # in one launch; more tensors take more launches
_NATIVE = {torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8}
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _plain(x):
    """View dtypes that Triton does not load and store as they are (bool, float8, complex64) as integers."""
    return x if x.dtype in _NATIVE else x.view(_WORD[x.element_size()])


def layout(x):
    """(heads, D, S, (batch, head, sequence strides)) of a rank 2, 3 or 4 tensor; batch stride 0 = one for all samples."""
    batch = x.stride(0) if x.shape[0] > 1 else 0
    if x.ndim == 4:
        return x.shape[1], x.shape[3], x.shape[2], (batch, x.stride(1), x.stride(2))
    return 1, x.shape[2] if x.ndim == 3 else 1, x.shape[1], (batch, 0, x.stride(1))


def launch_grouped(kernel, items, index, block_bytes, block_k, *tiles_of_k):
    """``kernel`` on ``items``, tuples of tensors of which the first has the layout of interest, MAX_TENSORS in a launch.

    A unit is one block of columns, at most ``block_bytes`` wide, of one head of one item. Grid: (units, *tiles_of_k, B).
    """
    (B, K), index = index.shape, index.contiguous()
    for start in range(0, len(items), MAX_TENSORS):
        groups = {}
        for item in items[start : start + MAX_TENSORS]:
            groups.setdefault((item[0].dtype, *layout(item[0])), []).append([_plain(x) for x in item])
        pointers, shapes, first_units = [], [], [0]
        for (dtype, heads, D, _, _), members in groups.items():
            block = min(triton.next_power_of_2(D), block_bytes // dtype.itemsize)
            pointers.append(tuple(zip(*members, strict=True)))
            shapes.append((len(members), heads, D, block))
            first_units.append(first_units[-1] + len(members) * heads * triton.cdiv(D, block))
        _, _, _, lengths, strides = zip(*groups, strict=True)
        args = (*zip(*pointers, strict=True), strides, coded(lengths), tuple(first_units), index, K)
        meta = dict(zip(("COUNTS", "HEADS", "WIDTHS", "BLOCKS"), zip(*shapes, strict=True), strict=True))
        launch(kernel, (first_units[-1], *tiles_of_k, B), *args, **meta, BLOCK_K=block_k, num_warps=4)


def coded(numbers):
    """Numbers of a tuple as odd ones above 1: for 1 and for multiples of 16 in it Triton would compile anew."""
    return tuple(2 * number + 3 for number in numbers)


@triton.jit
def decoded(code):
    """The number."""
    return (code - 3) >> 1


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
