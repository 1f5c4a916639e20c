"""From the columns of a sample to its survivors: what one program does, or several, in prune_tokens and prune_scored.

The columns that stay are numbered (_columns.py, which says what samples, choices and work are), then all positions are.
"""

import triton
import triton.language as tl

from vlmprune.triton_kernels._columns import (
    GONE,
    NO_COLUMN,
    count_before,
    last_visible,
    number_columns,
    padded,
    put_ahead,
    segment,
    visible,
)
from vlmprune.triton_kernels._device import spread
from vlmprune.triton_kernels.select_topk import _last_kept, _load_keys


@triton.jit
def _fill(x_ptr, start, stop, value, CHUNK: tl.constexpr):
    for begin in range(start, stop, CHUNK):
        offs = begin + tl.arange(0, CHUNK)
        tl.store(x_ptr + offs, tl.full((CHUNK,), value, x_ptr.dtype.element_ty), mask=offs < stop)


@triton.jit
def _count_visible(sample, stop, CHUNK: tl.constexpr):
    """How many positions before ``stop`` can be seen."""
    count = tl.zeros((), tl.int32) + stop
    if sample[2] is not None:
        count = tl.zeros((), tl.int32)
        for start in range(0, stop, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            count += tl.sum(visible(sample, offs, offs < stop).to(tl.int32), 0)
    return count


@triton.jit
def _place_positions(
    sample,
    marks_ptr,
    index_ptr,  # of this sample's first slot
    places_ptr,
    most,
    span,  # (first, last + 1) of the positions to place
    base,  # what the index counts from
    slot,  # of place 0 in the outputs
    taken,  # slots to leave free; below 0: how many survivors are cut off first
    slots,
    CHUNK: tl.constexpr,
):
    """List every position that stays, and where the columns among them stand; the slot behind them."""
    for start in range(span[0], span[1], CHUNK):
        offs = start + tl.arange(0, CHUNK)
        mark = tl.load(marks_ptr + offs, mask=offs < span[1], other=GONE, cache_modifier=".cg")
        stays = visible(sample, offs, mark != GONE)
        ones = stays.to(tl.int32)
        place = taken + tl.cumsum(ones, 0) - ones
        place = spread(tl.where(stays & (place >= 0) & (place < slots), place, -1))
        mark = spread(tl.where(stays & (mark < most), mark, NO_COLUMN))
        tl.store(index_ptr + place, (offs - sample[5]).to(tl.int64) + base, mask=place >= 0)
        stands = tl.where(place >= 0, slot + place, -1)
        tl.store(places_ptr + mark, stands.to(tl.int64), mask=mark >= 0)
        taken += tl.sum(ones, 0)
    return taken


@triton.jit
def _count_staying(sample, marks_ptr, CHUNK: tl.constexpr):
    count = tl.zeros((), tl.int32)
    for start in range(sample[5], sample[4], CHUNK):
        offs = start + tl.arange(0, CHUNK)
        mark = tl.load(marks_ptr + offs, mask=offs < sample[4], other=GONE, cache_modifier=".cg")
        count += tl.sum(visible(sample, offs, mark != GONE).to(tl.int32), 0)
    return count


@triton.jit
def _dropped_before(columns_ptr, choice, samples, N, CHUNK: tl.constexpr):
    """How many positions the first ``samples`` of a packed batch lose: real columns beyond the quotas. All pointers at 0."""
    dropped = tl.zeros((), tl.int64)
    for b in range(samples):
        real = tl.zeros((), tl.int32)
        for begin in range(0, N, CHUNK):
            offs = begin + tl.arange(0, CHUNK)
            column = tl.load(columns_ptr + b * N + offs, mask=offs < N, other=-1)
            real += tl.sum((column >= 0).to(tl.int32), 0)
        start = tl.zeros((), tl.int32)
        for i in range(choice[3]):
            size, quota = segment(choice, b, i, start, real)
            dropped -= tl.minimum(tl.maximum(quota, 0), size.to(tl.int64))
            start += size
        dropped += real
    return dropped


@triton.jit
def _bound(sample, n):
    """The position of column ``n``; that of one that is not there is the length."""
    columns_ptr, _, _, N, length, _ = sample
    column = tl.load(columns_ptr + n, mask=n < N, other=-1)
    return tl.where((column >= 0) & (column < length), column, length).to(tl.int32)


@triton.jit
def _choose_share(
    sample,
    choice,
    work,
    kept_ptr,
    most,
    b,
    share,
    start,  # the share's first position
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Number the columns of one share; how many columns stay in all, and how many positions before the share."""
    N, n = sample[3], tl.zeros((), tl.int32)
    row = (work[0], None, 1, padded(N), None)
    keys = _load_keys(row, tl.arange(0, KEYS))
    chosen = _last_kept(row, keys, segment(choice, b, 0, 0, N)[1], KEYS, IN_REGISTERS)
    first, last = share * CHUNK, tl.minimum((share + 1) * CHUNK, padded(N))
    above, equal, there = count_before(row, chosen[0], first, CHUNK)
    counts = (n, above, equal)
    number_columns(sample, work, kept_ptr, most, row, keys, chosen, counts, 0, first, last, CHUNK, False)
    ahead = _count_visible(sample, start, CHUNK) - there + above + tl.minimum(equal, chosen[1])
    return chosen[2], ahead


@triton.jit
def _choose_all(
    sample,
    choice,
    work,
    kept_ptr,
    most,
    b,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Number all columns; how many stay."""
    N, none, n = sample[3], tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    if choice[1] is None:
        ONCE: tl.constexpr = IN_REGISTERS and KEYS == CHUNK
        row = (work[0], None, 1, padded(N), None)
        keys = _load_keys(row, tl.arange(0, KEYS))
        chosen = _last_kept(row, keys, segment(choice, b, 0, 0, N)[1], KEYS, IN_REGISTERS)
        counts, last = (none, none, none), CHUNK if ONCE else padded(N)
        return number_columns(
            sample, work, kept_ptr, most, row, keys, chosen, counts, 0, 0, last, CHUNK, ONCE
        )
    begin = tl.zeros((), tl.int32)
    for i in range(choice[3] + 1):
        size, quota = segment(choice, b, i, begin, N)
        row = (work[0] + begin, None, 1, size, None)
        keys = _load_keys(row, tl.arange(0, KEYS))
        chosen = _last_kept(row, keys, quota, KEYS, IN_REGISTERS)
        counts = (n, none, none)
        n = number_columns(
            sample, work, kept_ptr, most, row, keys, chosen, counts, begin, 0, size, CHUNK, False
        )
        begin += size
    return n


@triton.jit
def choose_survivors(
    sample,
    choice,
    work,  # its columns entered
    outputs,  # (index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr or None), at sample 0
    sizes,  # (start_k, width, most)
    b,
    last_sample,
    share,  # of ``shares``: CHUNK columns, and the positions from the first of them on
    shares,
    SHARED: tl.constexpr,  # there are several: no codes or segments, padding on the right, nothing packed or in the past
    NEWEST: tl.constexpr,
    LEFT: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """The rest for a share of sample ``b``, by one program. Threads read what others wrote: barriers between the steps."""
    index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr = outputs
    start_k, width, most = sizes
    columns_ptr, _, _, N, length, first = sample
    marks_ptr = work[1]
    kept_ptr += b * most
    places_ptr += b * most
    if NEWEST:
        put_ahead(last_visible(sample, CHUNK), N, work, CHUNK)
    start, stop = tl.zeros((), tl.int32), length
    if SHARED:
        start = tl.where(share == 0, 0, _bound(sample, share * CHUNK))
        stop = tl.where(share == shares - 1, length, _bound(sample, (share + 1) * CHUNK))
    _fill(marks_ptr, start, stop, NO_COLUMN, CHUNK)
    if first > 0:  # columns in the past have no place
        _fill(places_ptr, 0, most, -1, CHUNK)
    tl.debug_barrier()
    taken = tl.zeros((), tl.int32)
    if SHARED:
        n, taken = _choose_share(
            sample, choice, work, kept_ptr, most, b, share, start, KEYS, CHUNK, IN_REGISTERS
        )
    else:
        n = _choose_all(sample, choice, work, kept_ptr, most, b, KEYS, CHUNK, IN_REGISTERS)
    tl.debug_barrier()
    if LEFT:
        taken += width - _count_staying(sample, marks_ptr, CHUNK)
    before = taken
    slot = tl.zeros((), tl.int64)
    slots = tl.zeros((), tl.int32) + width
    if ends_ptr is None:
        index_ptr += b * width
    else:
        slot = start_k - _dropped_before(columns_ptr - b * N, choice, b, N, CHUNK)
        index_ptr += slot
        slots = tl.maximum(width - slot, 0).to(tl.int32)
    span = (tl.maximum(start, first), stop)
    taken = _place_positions(
        sample, marks_ptr, index_ptr, places_ptr, most, span, start_k, slot, taken, slots, CHUNK
    )
    if share == shares - 1:
        count = taken - (before if LEFT else 0)
        tl.store(count_ptr + b, count.to(tl.int64))
        _fill(kept_ptr, n, most, -1, CHUNK)
        _fill(places_ptr, n, most, -1, CHUNK)
        if LEFT:
            _fill(index_ptr, 0, before, -1, CHUNK)
        if ends_ptr is None:
            _fill(index_ptr, taken, width, -1, CHUNK)
        else:
            tl.store(ends_ptr + b + 1, slot + count)
            if b == 0:
                tl.store(ends_ptr, 0)
            if b == last_sample:
                _fill(index_ptr, taken, slots, -1, CHUNK)
