"""From the scores of a sample to its survivors: what one program does for a sample, in prune_tokens and prune_scored.

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
# 0 with whatever columns are left. Columns ascend, so numbers and places do, too.


@triton.jit
def _columns(sample, offs):
    """Positions of columns ``offs``, and which are there to be seen."""
    columns_ptr, _, mask_ptr, N, length, _ = sample
    column = tl.load(columns_ptr + offs, mask=offs < N, other=-1)
    real = (column >= 0) & (column < length)
    if mask_ptr is not None:
        real = real & (tl.load(mask_ptr + column, mask=real, other=0) != 0)
    return column, real


@triton.jit
def enter_columns(sample, keys_ptr, score, offs):
    """Write the key of select_topk by which each column competes: FORCED stays beyond the quota, 0 is not there or goes."""
    _, code_ptr, _, N, _, _ = sample
    _, real = _columns(sample, offs)
    key = _order_key(score)
    if code_ptr is not None:
        code = tl.load(code_ptr + offs, mask=real, other=2)
        key = tl.where(code == 1, FORCED, tl.where((code == 0) | (code == 3), key, 0)).to(tl.uint32)
    key = tl.where(real, key, 0).to(tl.uint32)
    tl.store(keys_ptr + offs, key.to(tl.int32, bitcast=True), mask=offs < N)


@triton.jit
def clear_marks(marks_ptr, length, share, shares, CHUNK: tl.constexpr):
    """Say of one of ``shares`` equal shares of the positions that they are no columns."""
    size = (length + shares - 1) // shares
    stop = tl.minimum((share + 1) * size, length)
    for start in range(share * size, stop, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        tl.store(marks_ptr + offs, tl.full((CHUNK,), NO_COLUMN, tl.int32), mask=offs < stop)


@triton.jit
def _look(sample, CHUNK: tl.constexpr):
    """The last visible position, and how many there are from ``first`` on."""
    _, _, mask_ptr, _, length, first = sample
    last, count = length - 1, length - first
    if mask_ptr is not None:
        last, count = tl.full((), -1, tl.int32), tl.zeros((), tl.int32)
        for start in range(0, length, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            visible = tl.load(mask_ptr + offs, mask=offs < length, other=0) != 0
            last = tl.maximum(last, tl.max(tl.where(visible, offs, -1), 0))
            count += tl.sum((visible & (offs >= first)).to(tl.int32), 0)
    return last, count


@triton.jit
def _put_ahead(sample, last, keys_ptr, CHUNK: tl.constexpr):
    """The column at the last visible position competes before all others, unless it stays anyway."""
    _, code_ptr, _, N, _, _ = sample
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        column, real = _columns(sample, offs)
        ahead = real & (column == last)
        if code_ptr is not None:
            ahead = ahead & (tl.load(code_ptr + offs, mask=ahead, other=2) != 1)
        tl.store(keys_ptr + offs, tl.full((CHUNK,), -2, tl.int32), mask=ahead)  # FORCED - 1


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
def _choose_columns(
    sample,
    choice,
    b,
    keys_ptr,
    marks_ptr,
    kept_ptr,
    places_ptr,
    most,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Number the columns that stay, and list the first ``most``: how many go, from ``first`` on."""
    _, code_ptr, _, N, _, first = sample
    rounds = choice[3]
    if choice[1] is not None:
        rounds += 1
    gone = tl.zeros((), tl.int32)
    n = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    ONE_PASS: tl.constexpr = IN_REGISTERS and KEYS == CHUNK
    for i in range(rounds):
        size, quota = _segment(choice, b, i, start, N)
        row = (keys_ptr + start, None, 1, size, None)
        keys = _load_keys(row, tl.arange(0, KEYS))
        threshold, ties, _need = _last_kept(row, keys, quota, KEYS, IN_REGISTERS)
        n_above = tl.zeros((), tl.int32)
        n_equal = tl.zeros((), tl.int32)
        for begin in range(0, CHUNK if ONE_PASS else size, CHUNK):
            offs = begin + tl.arange(0, CHUNK)
            part = keys if ONE_PASS else _load_keys(row, offs)
            stays, _slot, n_above, n_equal = _kept_before(part, threshold, ties, n_above, n_equal)
            at = start + offs
            column, real = _columns(sample, tl.where(offs < size, at, N))
            stays = stays & real
            if code_ptr is not None:  # stays in any case, unless it competed as the newest does
                code = tl.load(code_ptr + at, mask=real, other=2)
                stays = stays | (real & (code == 3) & (part != FORCED - 1))
            ones = stays.to(tl.int32)
            number = n + tl.cumsum(ones, 0) - ones
            tl.store(marks_ptr + column, tl.where(stays, number, GONE), mask=real)
            listed = stays & (number < most)
            tl.store(kept_ptr + number, at.to(tl.int64), mask=listed)
            tl.store(places_ptr + number, tl.full((CHUNK,), -1, tl.int64), mask=listed & (column < first))
            n += tl.sum(ones, 0)
            gone += tl.sum(tl.where(stays, 0, (real & (column >= first)).to(tl.int32)), 0)
        start += size
    for begin in range(n, most, CHUNK):
        offs = begin + tl.arange(0, CHUNK)
        tl.store(kept_ptr + offs, tl.full((CHUNK,), -1, tl.int64), mask=offs < most)
        tl.store(places_ptr + offs, tl.full((CHUNK,), -1, tl.int64), mask=offs < most)
    return gone


@triton.jit
def _place_positions(
    sample,
    marks_ptr,
    index_ptr,  # of this sample's first slot
    places_ptr,
    most,
    base,  # what the index counts from
    slot,  # of place 0 in the outputs
    before,  # slots to leave free; below 0: how many survivors are cut off first
    slots,
    CHUNK: tl.constexpr,
):
    """List every position that stays, and where the columns among them stand; -1 where none is."""
    _, _, mask_ptr, _, length, first = sample
    taken = before
    for start in range(first, length, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        mark = tl.load(marks_ptr + offs, mask=offs < length, other=GONE, cache_modifier=".cg")
        stays = mark != GONE
        if mask_ptr is not None:
            stays = stays & (tl.load(mask_ptr + offs, mask=stays, other=0) != 0)
        ones = stays.to(tl.int32)
        place = taken + tl.cumsum(ones, 0) - ones
        inside = stays & (place >= 0) & (place < slots)
        tl.store(index_ptr + place, offs.to(tl.int64) - first + base, mask=inside)
        stands = tl.where(inside, slot + place, -1)
        tl.store(places_ptr + mark, stands.to(tl.int64), mask=stays & (mark >= 0) & (mark < most))
        taken += tl.sum(ones, 0)
    for start in range(0, slots, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        free = (offs < slots) & ((offs < before) | (offs >= taken))
        tl.store(index_ptr + offs, tl.full((CHUNK,), -1, tl.int64), mask=free)


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
def choose_survivors(
    sample,
    choice,
    work,  # (keys_ptr, marks_ptr), this sample's, as enter_columns and clear_marks left them
    outputs,  # (index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr or None), at sample 0
    sizes,  # (start_k, width, most)
    b,
    last_sample,
    NEWEST: tl.constexpr,
    LEFT: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """All of it for sample ``b``. Threads read what others have written: a barrier between any two steps."""
    index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr = outputs
    (keys_ptr, marks_ptr), (start_k, width, most) = work, sizes
    kept_ptr += b * most
    places_ptr += b * most
    last, count = _look(sample, CHUNK)
    if NEWEST:
        _put_ahead(sample, last, keys_ptr, CHUNK)
        tl.debug_barrier()
    count -= _choose_columns(
        *(sample, choice, b, keys_ptr, marks_ptr, kept_ptr, places_ptr, most, KEYS, CHUNK, IN_REGISTERS)
    )
    tl.debug_barrier()
    slot = tl.zeros((), tl.int64)
    slots = tl.zeros((), tl.int32) + width
    if ends_ptr is None:
        index_ptr += b * width
    else:
        slot = start_k - _dropped_before(sample[0] - b * sample[3], choice, b, sample[3], CHUNK)
        index_ptr += slot
        slots = tl.maximum(width - slot, 0).to(tl.int32)
        if b < last_sample:  # the last one fills up what is left
            slots = tl.minimum(slots, count)
    before = tl.zeros((), tl.int32)
    if LEFT:
        before += width - count
    _place_positions(sample, marks_ptr, index_ptr, places_ptr, most, start_k, slot, before, slots, CHUNK)
    tl.store(count_ptr + b, count.to(tl.int64))
    if ends_ptr is not None:
        tl.store(ends_ptr + b + 1, slot + count)
        if b == 0:
            tl.store(ends_ptr, 0)
