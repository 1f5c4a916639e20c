"""Exact top-k of each segment: index[b] = ascending positions of the quotas[i] best scores of every segment i.

Latency bound. A segment is a row of select_topk, and its first slot is known on the host: no program waits for another.
The bounds travel by value in the launch, so nothing is copied to the device.
Tile: CHUNK positions. Grid: (B, segments).
"""

import itertools

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._rows import coded, decoded
from vlmprune.triton_kernels.select_topk import LONG_CHUNK, REGISTERS, _select_row, tiles

MAX_SEGMENTS = 64  # of one launch; more segments take more launches


@triton.jit
def _pick(values, i, COUNT: tl.constexpr):
    """The ith number of a tuple of codes."""
    code = values[0]
    for j in tl.static_range(1, COUNT):
        code = tl.where(i == j, values[j], code)
    return decoded(code)


@triton.jit(do_not_specialize=["width", "stride_sb"])
def _select_segments_kernel(
    scores_ptr,  # [B, N]
    starts,  # codes of COUNT + 1 numbers: where each segment starts, and where the last one ends
    slots,  # codes of COUNT + 1 numbers: the same for its places in the index
    index_ptr,  # [B, width] int64, contiguous
    width,
    stride_sb,
    stride_sn,
    COUNT: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, slot = _pick(starts, i, COUNT), _pick(slots, i, COUNT)
    quota = _pick(slots, i + 1, COUNT + 1) - slot
    start = scores_ptr + b * stride_sb + first.to(tl.int64) * stride_sn
    row = (start, None, stride_sn, _pick(starts, i + 1, COUNT + 1) - first, None)
    _select_row(
        row, quota.to(tl.int64), index_ptr + b * width + slot, first, quota, KEYS, CHUNK, IN_REGISTERS
    )


def _codes(bounds, count):
    """``count`` of them, the last one repeated."""
    return coded([*bounds, *bounds[-1:] * (count - len(bounds))])


def select_segments(scores, segments, quotas):
    """One program a segment and row, MAX_SEGMENTS of them in a launch; each quota is at most its segment's length."""
    B = scores.shape[0]
    width = sum(quotas)
    index = torch.empty((B, width), dtype=torch.int64, device=scores.device)
    if index.numel() == 0:
        return index
    starts, slots = ([0, *itertools.accumulate(x)] for x in (segments, quotas))
    # segments and slots start anywhere, so addresses hold more registers than a row's
    config = tiles(max(segments), LONG_CHUNK)
    for first in range(0, len(segments), MAX_SEGMENTS):
        last = min(first + MAX_SEGMENTS, len(segments))
        count = triton.next_power_of_2(last - first)
        args = (_codes(x[first : last + 1], count + 1) for x in (starts, slots))
        args = (scores, *args, index, width, *scores.stride())
        _select_segments_kernel[(B, last - first)](*args, COUNT=count, **config, **REGISTERS)
    return index
