"""From the scores of a sample to its survivors: what its tiles and then a program do, in prune_tokens and prune_scored.

Columns compete as a row of select_topk, or as one a segment; then the positions that stay are numbered in their order.
"""

import triton
import triton.language as tl

from vlmprune.triton_kernels.select_topk import FORCED, _kept_before, _last_kept, _load_keys, _order_key

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
def _fill(x_ptr, start, stop, value, CHUNK: tl.constexpr):
    for begin in range(start, stop, CHUNK):
        offs = begin + tl.arange(0, CHUNK)
        tl.store(x_ptr + offs, tl.full((CHUNK,), value, x_ptr.dtype.element_ty), mask=offs < stop)


@triton.jit
def _visible(sample, offs, ok):
    """Which positions ``offs`` can be seen."""
    mask_ptr = sample[2]
    if mask_ptr is not None:
        ok = ok & (tl.load(mask_ptr + offs, mask=ok, other=0) != 0)
    return ok


@triton.jit
def _last_visible(sample, CHUNK: tl.constexpr):
    _, _, mask_ptr, _, length, _ = sample
    last = length - 1
    if mask_ptr is not None:
        last = tl.full((), -1, tl.int32)
        for start in range(0, length, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            last = tl.maximum(last, tl.max(tl.where(_visible(sample, offs, offs < length), offs, -1), 0))
    return last


@triton.jit
def _count_visible(sample, stop, CHUNK: tl.constexpr):
    """How many positions before ``stop`` can be seen."""
    count = tl.zeros((), tl.int32) + stop
    if sample[2] is not None:
        count = tl.zeros((), tl.int32)
        for start in range(0, stop, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            count += tl.sum(_visible(sample, offs, offs < stop).to(tl.int32), 0)
    return count


@triton.jit
def _put_ahead(last, N, work, CHUNK: tl.constexpr):
    """The column at the last visible position competes before all others, unless it stays anyway."""
    for start in range(0, padded(N), CHUNK):
        offs = start + tl.arange(0, CHUNK)
        column = tl.load(work[0] + padded(N) + offs, mask=offs < padded(N), other=-1)
        ahead = (column == last) & (column >= 0)
        key = tl.load(work[0] + offs, mask=ahead, other=0)
        # -1 is FORCED, -2 the largest key but that
        tl.store(work[0] + offs, tl.full((CHUNK,), -2, tl.int32), mask=ahead & (key != -1))


@triton.jit
def _segment(choice, b, i, start, N):
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
def _number_columns(
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
        tl.store(marks_ptr + column, tl.where(stays, number, GONE), mask=column >= 0)
        tl.store(kept_ptr + number, (begin + offs).to(tl.int64), mask=stays & (number < most))
    return n + n_above + tl.minimum(n_equal, ties) + extra


@triton.jit
def _count_before(row, keys, threshold, stop, KEYS: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """Of the keys before ``stop``: how many are above the threshold, equal to it, and there at all."""
    above = tl.zeros((KEYS,), tl.int32)
    equal = tl.zeros((KEYS,), tl.int32)
    there = tl.zeros((KEYS,), tl.int32)
    for start in range(0, KEYS if IN_REGISTERS else row[3], KEYS):  # once: no loop at all
        offs = start + tl.arange(0, KEYS)
        if not IN_REGISTERS:
            keys = _load_keys(row, offs)
        before = offs < stop
        above += (before & (keys > threshold)).to(tl.int32)
        equal += (before & (keys == threshold)).to(tl.int32)
        there += (before & (keys != 0)).to(tl.int32)
    return tl.sum(above, 0), tl.sum(equal, 0), tl.sum(there, 0)


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
        stays = _visible(sample, offs, mark != GONE)
        ones = stays.to(tl.int32)
        place = taken + tl.cumsum(ones, 0) - ones
        inside = stays & (place >= 0) & (place < slots)
        tl.store(index_ptr + place, (offs - sample[5]).to(tl.int64) + base, mask=inside)
        stands = tl.where(inside, slot + place, -1)
        tl.store(places_ptr + mark, stands.to(tl.int64), mask=stays & (mark >= 0) & (mark < most))
        taken += tl.sum(ones, 0)
    return taken


@triton.jit
def _count_staying(sample, marks_ptr, CHUNK: tl.constexpr):
    count = tl.zeros((), tl.int32)
    for start in range(sample[5], sample[4], CHUNK):
        offs = start + tl.arange(0, CHUNK)
        mark = tl.load(marks_ptr + offs, mask=offs < sample[4], other=GONE, cache_modifier=".cg")
        count += tl.sum(_visible(sample, offs, mark != GONE).to(tl.int32), 0)
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
            size, quota = _segment(choice, b, i, start, real)
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
    chosen = _last_kept(row, keys, _segment(choice, b, 0, 0, N)[1], KEYS, IN_REGISTERS)
    first, last = share * CHUNK, tl.minimum((share + 1) * CHUNK, padded(N))
    above, equal, there = _count_before(row, keys, chosen[0], first, KEYS, IN_REGISTERS)
    counts = (n, above, equal)
    _number_columns(sample, work, kept_ptr, most, row, keys, chosen, counts, 0, first, last, CHUNK, False)
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
        chosen = _last_kept(row, keys, _segment(choice, b, 0, 0, N)[1], KEYS, IN_REGISTERS)
        counts, last = (none, none, none), CHUNK if ONCE else padded(N)
        return _number_columns(
            sample, work, kept_ptr, most, row, keys, chosen, counts, 0, 0, last, CHUNK, ONCE
        )
    begin = tl.zeros((), tl.int32)
    for i in range(choice[3] + 1):
        size, quota = _segment(choice, b, i, begin, N)
        row = (work[0] + begin, None, 1, size, None)
        keys = _load_keys(row, tl.arange(0, KEYS))
        chosen = _last_kept(row, keys, quota, KEYS, IN_REGISTERS)
        counts = (n, none, none)
        n = _number_columns(
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
        _put_ahead(_last_visible(sample, CHUNK), N, work, CHUNK)
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
