"""The columns of a sample, from their scores to numbers: what competes by which key, and what stays.

Columns compete as a row of select_topk, or as one a segment.
"""

import triton
import triton.language as tl

from vlmprune.triton_kernels._device import spread
from vlmprune.triton_kernels.select_topk import FORCED, _kept_before, _load_keys, _order_key

# What a position is, besides number 0, 1, ... of the columns that stay:
NO_COLUMN = tl.constexpr(-1)
GONE = tl.constexpr(-2)

# A sample is (columns_ptr, code_ptr or None, mask_ptr or None, N, length, first), its pointers at its first entries: of its
# ``length`` positions those from ``first`` on are in the tensors. A choice is (quota_ptr or None, segments_ptr or None,
# keep, parts), its pointers at sample 0: parts is how many segments there are, 1 without, and after them comes one of quota
# 0 with whatever columns are left. Columns ascend, so numbers and places do, too. Work is (entries_ptr [2, padded(N)] int32:
# of the columns their keys and their positions, -1 where there is nothing to see; marks_ptr [padded(length)] int32).


@triton.jit
def padded(n):
    """Rows of workspace this long begin at, and are read in, whole words of 16 bytes."""
    return (n + 15) // 16 * 16


@triton.jit
def visible(sample, offs, ok):
    """Which positions ``offs`` can be seen."""
    mask_ptr = sample[2]
    if mask_ptr is not None:
        ok = ok & (tl.load(mask_ptr + offs, mask=ok, other=0) != 0)
    return ok


@triton.jit
def enter_columns(sample, work, score, offs):
    """Enter the key of select_topk by which each column competes: FORCED stays beyond the quota, 0 is not there or goes."""
    columns_ptr, code_ptr, mask_ptr, N, length, _ = sample
    column = tl.load(columns_ptr + offs, mask=offs < N, other=-1)
    real = (column >= 0) & (column < length)
    if mask_ptr is not None:
        real = real & (tl.load(mask_ptr + column, mask=real, other=0) != 0)
    key = _order_key(score)
    if code_ptr is not None:
        code = tl.load(code_ptr + offs, mask=real, other=2)
        key = tl.where(code == 1, FORCED, tl.where((code == 0) | (code == 3), key, 0)).to(tl.uint32)
    key = tl.where(real, key, 0).to(tl.uint32)
    tl.store(work[0] + offs, key.to(tl.int32, bitcast=True), mask=offs < padded(N))
    at = tl.where(real, column, -1).to(tl.int32)
    tl.store(work[0] + padded(N) + offs, at, mask=offs < padded(N))


@triton.jit
def last_visible(sample, CHUNK: tl.constexpr):
    _, _, mask_ptr, _, length, _ = sample
    last = length - 1
    if mask_ptr is not None:
        last = tl.full((), -1, tl.int32)
        for start in range(0, length, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            last = tl.maximum(last, tl.max(tl.where(visible(sample, offs, offs < length), offs, -1), 0))
    return last


@triton.jit
def put_ahead(last, N, work, CHUNK: tl.constexpr):
    """The column at the last visible position competes before all others, unless it stays anyway."""
    for start in range(0, padded(N), CHUNK):
        offs = start + tl.arange(0, CHUNK)
        column = tl.load(work[0] + padded(N) + offs, mask=offs < padded(N), other=-1)
        ahead = (column == last) & (column >= 0)
        key = tl.load(work[0] + offs, mask=ahead, other=0)
        # -1 is FORCED, -2 the largest key but that
        tl.store(work[0] + offs, tl.full((CHUNK,), -2, tl.int32), mask=ahead & (key != -1))


@triton.jit
def segment(choice, b, i, start, N):
    """(columns, quota) of segment ``i`` of sample ``b``, which starts at column ``start``."""
    quota_ptr, segments_ptr, keep, parts = choice
    size = N - start
    quota = tl.zeros((), tl.int64) + keep
    if quota_ptr is not None:
        quota = tl.load(quota_ptr + b * parts + i, mask=i < parts, other=0)
    if segments_ptr is not None:
        listed = tl.load(segments_ptr + b * parts + i, mask=i < parts, other=N)
        size = tl.minimum(tl.maximum(listed, 0), size.to(tl.int64)).to(tl.int32)
        quota = tl.where(i < parts, quota, 0)
    return size, quota


@triton.jit
def number_columns(
    sample,
    work,
    kept_ptr,
    most,
    row,  # the segment's
    keys,  # its first ones
    chosen,  # what _last_kept says of it
    counts,  # (how many stay of the columns before the segment, how many keys from there to ``start`` are above, and equal)
    begin,  # of the segment
    start,  # from here to ``stop``, counted from ``begin``
    stop,
    CHUNK: tl.constexpr,
    FROM_REGISTERS: tl.constexpr,
):
    """Mark the positions of columns with their numbers if they stay; list the first ``most``; how many stay so far."""
    _, code_ptr, _, N, _, _ = sample
    entries_ptr, marks_ptr = work
    threshold, ties, _need = chosen
    n, n_above, n_equal = counts
    extra = tl.zeros((), tl.int32)
    for at in range(start, stop, CHUNK):
        offs = at + tl.arange(0, CHUNK)
        part = keys if FROM_REGISTERS else _load_keys(row, offs)
        column = tl.load(entries_ptr + padded(N) + begin + offs, mask=offs < row[3], other=-1)
        stays, slot, n_above, n_equal = _kept_before(part, threshold, ties, n_above, n_equal)
        number = n + slot
        if code_ptr is not None:  # stays in any case, unless it competed as the newest does
            code = tl.load(code_ptr + begin + offs, mask=column >= 0, other=2)
            too = ((code == 3) & (part != FORCED - 1) & (stays == 0)).to(tl.int32)
            number += extra + tl.cumsum(too, 0) - too
            extra += tl.sum(too, 0)
            stays = stays | (too != 0)
        at_column, mark = spread(column), spread(tl.where(stays, number, GONE))
        tl.store(marks_ptr + at_column, mark, mask=at_column >= 0)
        tl.store(kept_ptr + mark, (begin + offs).to(tl.int64), mask=(mark >= 0) & (mark < most))
    return n + n_above + tl.minimum(n_equal, ties) + extra


@triton.jit
def count_before(row, threshold, stop, CHUNK: tl.constexpr):
    """Of the keys before ``stop``: how many are above the threshold, equal to it, and there at all."""
    above = tl.zeros((CHUNK,), tl.int32)
    equal = tl.zeros((CHUNK,), tl.int32)
    there = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, stop, CHUNK):
        keys = _load_keys(row, start + tl.arange(0, CHUNK))  # whole chunks: stop is a multiple
        above += (keys > threshold).to(tl.int32)
        equal += (keys == threshold).to(tl.int32)
        there += (keys != 0).to(tl.int32)
    return tl.sum(above, 0), tl.sum(equal, 0), tl.sum(there, 0)
