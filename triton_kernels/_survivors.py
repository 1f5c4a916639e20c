"""From the scores of a sample to its survivors: what one program does for a sample, in prune_tokens and prune_scored.

Columns compete as a row of select_topk, or as one a segment; then every position has one number, its place in the outputs.
"""

import triton
import triton.language as tl

from vlmprune.triton_kernels.select_topk import FORCED, _kept_before, _last_kept, _load_keys, _order_key

# places of positions: in the outputs from 0 on, or
NOWHERE = tl.constexpr(-1)  # stays, but has none: none yet, in the past, or cut off
GONE = tl.constexpr(-2)

# A sample is (scores_ptr, columns_ptr, code_ptr or None, key_mask_ptr or None, N, length, first), its pointers at its first
# entries: of its ``length`` positions those from ``first`` on are in the tensors. A choice is (quota_ptr or None, segments_ptr
# or None, keep, parts), its pointers at sample 0: parts is how many segments there are, 1 without, and after them comes one
# of quota 0 with whatever columns are left.


@triton.jit
def _mark_positions(sample, place_ptr, CHUNK: tl.constexpr):
    """Visible positions stay, others go: the last visible one, and how many there are from ``first`` on."""
    _, _, _, key_mask_ptr, _, length, first = sample
    last = tl.full((), -1, tl.int32)
    count = tl.zeros((), tl.int32)
    for start in range(0, length, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        visible = offs < length
        if key_mask_ptr is not None:
            visible = visible & (tl.load(key_mask_ptr + offs, mask=visible, other=0) != 0)
        tl.store(place_ptr + offs, tl.where(visible, NOWHERE, GONE).to(tl.int32), mask=offs < length)
        last = tl.maximum(last, tl.max(tl.where(visible, offs, -1), 0))
        count += tl.sum((visible & (offs >= first)).to(tl.int32), 0)
    return last, count


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
def _enter_columns(sample, last, keys_ptr, place_ptr, NEWEST: tl.constexpr, CHUNK: tl.constexpr):
    """A key of select_topk for each column; those that must compete for it go. How many do, from ``first`` on."""
    scores_ptr, columns_ptr, code_ptr, key_mask_ptr, N, length, first = sample
    entered = tl.zeros((), tl.int32)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        column = tl.load(columns_ptr + offs, mask=offs < N, other=-1)
        real = (column >= 0) & (column < length)
        if key_mask_ptr is not None:
            real = real & (tl.load(key_mask_ptr + column, mask=real, other=0) != 0)
        key = _order_key(tl.load(scores_ptr + offs, mask=offs < N, other=0.0))
        goes = real
        if code_ptr is not None:
            code = tl.load(code_ptr + offs, mask=real, other=2)
            key = tl.where((code == 0) | (code == 3), key, 0).to(tl.uint32)
            goes = real & (code != 1) & (code != 3)
        if NEWEST:  # competes unless it stays anyway
            ahead = real & (column == last)
            if code_ptr is not None:
                ahead = ahead & (code != 1)
                goes = goes | ahead
            key = tl.where(ahead, FORCED - 1, key).to(tl.uint32)
        key = tl.where(real, key, 0).to(tl.uint32)
        tl.store(keys_ptr + offs, key.to(tl.int32, bitcast=True), mask=offs < N)
        tl.store(place_ptr + column, tl.full((CHUNK,), GONE, tl.int32), mask=goes)
        entered += tl.sum((goes & (column >= first)).to(tl.int32), 0)
    return entered


@triton.jit
def _choose_columns(sample, choice, b, keys_ptr, place_ptr, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr):
    """The best of each segment stay; how many of them would be gone, from ``first`` on."""
    _, columns_ptr, _, _, N, _, first = sample
    rounds = choice[3]
    if choice[1] is not None:
        rounds += 1
    chosen = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    for i in range(rounds):
        size, quota = _segment(choice, b, i, start, N)
        row = (keys_ptr + start, None, 1, size, 1)  # what is not there has key 0, below the floor of 1
        keys = _load_keys(row, tl.arange(0, CHUNK))
        threshold, ties, _need = _last_kept(row, keys, quota, CHUNK, ONE_CHUNK)
        n_above = tl.zeros((), tl.int32)
        n_equal = tl.zeros((), tl.int32)
        for begin in range(0, size, CHUNK):
            offs = begin + tl.arange(0, CHUNK)
            if not ONE_CHUNK:
                keys = _load_keys(row, offs)
            stays, _slot, n_above, n_equal = _kept_before(keys, threshold, ties, n_above, n_equal)
            column = tl.load(columns_ptr + start + offs, mask=stays, other=-1)
            place = tl.load(place_ptr + column, mask=stays, other=NOWHERE)
            tl.store(place_ptr + column, tl.full((CHUNK,), NOWHERE, tl.int32), mask=stays)
            chosen += tl.sum(((place == GONE) & (column >= first)).to(tl.int32), 0)
        start += size
    return chosen


@triton.jit
def _place_positions(
    place_ptr,
    index_ptr,  # of this sample's first slot
    first,
    length,
    base,  # what the index counts from
    before,  # slots to leave free; below 0: how many survivors are cut off first
    slots,
    CHUNK: tl.constexpr,
):
    """Give every position that stays its place and list it there; -1 where none is."""
    slot = before
    for start in range(first, length, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        stays = tl.load(place_ptr + offs, mask=offs < length, other=GONE) != GONE
        ones = stays.to(tl.int32)
        place = slot + tl.cumsum(ones, 0) - ones
        inside = stays & (place >= 0) & (place < slots)
        tl.debug_barrier()  # another thread may read a place than the one that writes it
        tl.store(place_ptr + offs, tl.where(inside, place, NOWHERE), mask=stays)
        tl.store(index_ptr + place, offs.to(tl.int64) - first + base, mask=inside)
        slot += tl.sum(ones, 0)
    for start in range(0, slots, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        free = (offs < slots) & ((offs < before) | (offs >= slot))
        tl.store(index_ptr + offs, tl.full((CHUNK,), -1, tl.int64), mask=free)


@triton.jit
def _list_columns(
    sample,
    place_ptr,
    kept_ptr,
    places_ptr,
    slot,  # of place 0
    most,
    CHUNK: tl.constexpr,
):
    """Which columns stay, and where they stand in the outputs; -1 behind them."""
    _, columns_ptr, _, _, N, length, _ = sample
    n = tl.zeros((), tl.int32)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        column = tl.load(columns_ptr + offs, mask=offs < N, other=-1)
        real = (column >= 0) & (column < length)
        place = tl.load(place_ptr + column, mask=real, other=GONE)
        ones = (place != GONE).to(tl.int32)
        at = n + tl.cumsum(ones, 0) - ones
        listed = (place != GONE) & (at < most)
        tl.store(kept_ptr + at, offs.to(tl.int64), mask=listed)
        tl.store(places_ptr + at, tl.where(place >= 0, slot + place, -1).to(tl.int64), mask=listed)
        n += tl.sum(ones, 0)
    for start in range(0, most, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        free = (offs >= n) & (offs < most)
        tl.store(kept_ptr + offs, tl.full((CHUNK,), -1, tl.int64), mask=free)
        tl.store(places_ptr + offs, tl.full((CHUNK,), -1, tl.int64), mask=free)


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
    work,  # (keys_ptr [B, N] int32, place_ptr [B, longest] int32), at sample 0
    outputs,  # (index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr or None), at sample 0
    sizes,  # (start_k, longest, width, most)
    b,
    last_sample,
    NEWEST: tl.constexpr,
    LEFT: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):
    """All of it for sample ``b``. Threads read what others have written: a barrier between any two steps."""
    index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr = outputs
    start_k, longest, width, most = sizes
    _, columns_ptr, _, _, N, length, first = sample
    keys_ptr, place_ptr = work[0] + b * N, work[1] + b * longest
    last, count = _mark_positions(sample, place_ptr, CHUNK)
    tl.debug_barrier()
    count -= _enter_columns(sample, last, keys_ptr, place_ptr, NEWEST, CHUNK)
    tl.debug_barrier()
    count += _choose_columns(sample, choice, b, keys_ptr, place_ptr, CHUNK, ONE_CHUNK)
    tl.debug_barrier()
    slot = tl.zeros((), tl.int64)
    slots = tl.zeros((), tl.int32) + width
    if ends_ptr is None:
        index_ptr += b * width
    else:
        slot = start_k - _dropped_before(columns_ptr - b * N, choice, b, N, CHUNK)
        index_ptr += slot
        slots = tl.maximum(width - slot, 0).to(tl.int32)
        if b < last_sample:  # the last one fills up what is left
            slots = tl.minimum(slots, count)
    before = tl.zeros((), tl.int32)
    if LEFT:
        before += width - count
    _place_positions(place_ptr, index_ptr, first, length, start_k, before, slots, CHUNK)
    tl.debug_barrier()
    _list_columns(sample, place_ptr, kept_ptr + b * most, places_ptr + b * most, slot, most, CHUNK)
    tl.store(count_ptr + b, count.to(tl.int64))
    if ends_ptr is not None:
        tl.store(ends_ptr + b + 1, slot + count)
        if b == 0:
            tl.store(ends_ptr, 0)
