"""From the scores of a sample to its survivors: what one program does for a sample, in prune_tokens and prune_scored.

Columns compete, segment by segment, as rows of select_topk; every position then has one number, its place in the output.
"""

import triton
import triton.language as tl

from vlmprune.triton_kernels.select_topk import _kept_before, _last_kept, _load_keys, column_codes

# places of positions: in the outputs from 0 on, or
NOWHERE = tl.constexpr(-1)  # stays, but has none: none yet, in the past, or cut off
GONE = tl.constexpr(-2)

# A sample is (scores_ptr, columns_ptr, key_mask_ptr or None, N, length, first), its pointers at its first entries: of its
# ``length`` positions those from ``first`` on are in the tensors. A choice is (quota_ptr, code_ptr, segments_ptr: each None
# or at this sample's first entry; keep, parts): parts is how many segments there are, 1 without, and after them one of
# quota 0 with whatever columns are left.


@triton.jit
def _mark_positions(sample, place_ptr, CHUNK: tl.constexpr):
    """Visible positions stay, others go: the last visible one, and how many there are from ``first`` on."""
    _, _, key_mask_ptr, _, length, first = sample
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
def _segment(choice, i, start, N):
    """(columns, quota) of segment ``i``, which starts at column ``start``."""
    quota_ptr, _, segments_ptr, keep, parts = choice
    size = N - start
    quota = tl.zeros((), tl.int64) + keep
    if quota_ptr is not None:
        quota = tl.load(quota_ptr + i, mask=i < parts, other=0)
    if segments_ptr is not None:
        listed = tl.load(segments_ptr + i, mask=i < parts, other=N)
        size = tl.minimum(tl.maximum(listed, 0), size.to(tl.int64)).to(tl.int32)
        quota = tl.where(i < parts, quota, 0)
    return size, quota


@triton.jit
def _rounds(choice):
    """How many times a sample selects."""
    rounds = choice[4]
    if choice[2] is not None:
        rounds += 1
    return rounds


@triton.jit
def _drop_columns(
    sample, choice, last, place_ptr, NEWEST: tl.constexpr, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr
):
    """Mark the columns that do not stay; return how many of them there are from ``first`` on."""
    scores_ptr, columns_ptr, key_mask_ptr, N, length, first = sample
    newest = None
    if NEWEST:
        newest = last
    dropped = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    for i in range(_rounds(choice)):
        size, quota = _segment(choice, i, start, N)
        code_ptr = choice[1]
        if code_ptr is not None:
            code_ptr += start
        columns = (columns_ptr + start, key_mask_ptr, length, newest)
        row = (scores_ptr + start, code_ptr, 1, size, None, columns)
        keys = _load_keys(row, tl.arange(0, CHUNK))
        threshold, ties, _ = _last_kept(row, keys, quota, CHUNK, ONE_CHUNK)
        n_above = tl.zeros((), tl.int32)
        n_equal = tl.zeros((), tl.int32)
        for begin in range(0, size, CHUNK):
            offs = begin + tl.arange(0, CHUNK)
            if not ONE_CHUNK:
                keys = _load_keys(row, offs)
            stays, _, n_above, n_equal = _kept_before(keys, threshold, ties, n_above, n_equal)
            column, real, code = column_codes(row, offs)
            goes = real & (stays == 0)
            if code_ptr is not None:
                goes = goes & (code != 1) & (code != 3)
            tl.store(place_ptr + column, tl.full((CHUNK,), GONE, tl.int32), mask=goes)
            dropped += tl.sum((goes & (column >= first)).to(tl.int32), 0)
        start += size
    return dropped


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
    _, columns_ptr, _, N, length, _ = sample
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
        for start in range(0, N, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            column = tl.load(columns_ptr + b * N + offs, mask=offs < N, other=-1)
            real += tl.sum((column >= 0).to(tl.int32), 0)
        start = tl.zeros((), tl.int32)
        own = at_sample(choice, b, N)
        for i in range(choice[4]):
            size, quota = _segment(own, i, start, real)
            dropped -= tl.minimum(tl.maximum(quota, 0), size.to(tl.int64))
            start += size
        dropped += real
    return dropped


@triton.jit
def at_sample(choice, b, N):
    """The choice with its pointers at sample ``b``."""
    quota_ptr, code_ptr, segments_ptr, keep, parts = choice
    if quota_ptr is not None:
        quota_ptr += b * parts
    if code_ptr is not None:
        code_ptr += b * N
    if segments_ptr is not None:
        segments_ptr += b * parts
    return quota_ptr, code_ptr, segments_ptr, keep, parts


@triton.jit
def choose_survivors(
    sample,
    choice,  # its pointers at sample 0
    outputs,  # (place_ptr [B, longest] int32, index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr or None), at sample 0
    sizes,  # (start_k, longest, width, most)
    b,
    last_sample,
    NEWEST: tl.constexpr,
    LEFT: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):
    """All of it for sample ``b``. Threads read what others have written: a barrier between any two steps."""
    place_ptr, index_ptr, count_ptr, kept_ptr, places_ptr, ends_ptr = outputs
    start_k, longest, width, most = sizes
    _, columns_ptr, _, N, length, first = sample
    place_ptr += b * longest
    last, visible = _mark_positions(sample, place_ptr, CHUNK)
    tl.debug_barrier()
    own = at_sample(choice, b, N)
    count = visible - _drop_columns(sample, own, last, place_ptr, NEWEST, CHUNK, ONE_CHUNK)
    tl.debug_barrier()
    tl.store(count_ptr + b, count.to(tl.int64))
    slot = tl.zeros((), tl.int64)
    slots = tl.zeros((), tl.int32) + width
    if ends_ptr is None:
        index_ptr += b * width
    else:
        slot = start_k - _dropped_before(columns_ptr - b * N, choice, b, N, CHUNK)
        index_ptr += slot
        tl.store(ends_ptr + b + 1, slot + count)
        if b == 0:
            tl.store(ends_ptr, 0)
        slots = tl.maximum(width - slot, 0).to(tl.int32)
        if b < last_sample:  # the last one fills up what is left
            slots = tl.minimum(slots, count)
    before = tl.zeros((), tl.int32)
    if LEFT:
        before += width - count
    _place_positions(place_ptr, index_ptr, first, length, start_k, before, slots, CHUNK)
    tl.debug_barrier()
    _list_columns(sample, place_ptr, kept_ptr + b * most, places_ptr + b * most, slot, most, CHUNK)
