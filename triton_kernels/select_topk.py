"""Exact top-k in position order: index[b] = ascending positions of the keep[b] best scores and of every forced one.

Latency bound: a row is a few thousand numbers. One threshold problem: each position gets a 32-bit key whose integer
order is the score order (forced = largest, dropped or below the threshold = 0), four 8-bit radix rounds find the smallest
kept key, unless all are kept, and a prefix sum over "kept" gives every survivor its slot, already sorted. Ties go to the
lower position.
Tile: CHUNK positions; a row that fits one chunk is read once and stays in registers. Grid: (B,).
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import registers
from vlmprune.triton_kernels._launch import launch

MAX_CHUNK = 4096  # keys per pass, 8 a thread at 16 warps; below 65536, as two 16-bit counts share one scan
MIN_CHUNK = 128
KEYS_PER_WARP = 256
REGISTERS = registers(128)  # what 16 warps may have
FORCED = tl.constexpr(0xFFFFFFFF)  # above the key of +inf, 0xFF800000
NAN_KEY = tl.constexpr(1)  # below the key of -inf, 0x007FFFFF; 0 is "not there"


@triton.jit
def _order_key(scores):
    """Float -> uint32 whose order is the float order; -0.0 equals 0.0 and every NaN is lowest. An int32 is such a key."""
    if scores.dtype == tl.int32:
        return scores.to(tl.uint32, bitcast=True)
    if scores.dtype == tl.bfloat16:  # by its bits: exact for denormals, in the interpreter too
        bits = scores.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    else:
        bits = scores.to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits).to(tl.uint32)
    flip = tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, NAN_KEY, bits ^ flip).to(tl.uint32)


# A row is (scores_ptr, code_ptr or None, stride_sn, N, floor): its competing positions must reach the key floor, if any.


@triton.jit
def _load_keys(row, offs):
    """Keys of positions ``offs``: 0 = dropped, past the end, or competing below the floor."""
    scores_ptr, code_ptr, stride_sn, N, floor = row
    mask = offs < N
    key = _order_key(tl.load(scores_ptr + offs.to(tl.int64) * stride_sn, mask=mask, other=0.0))
    if floor is not None:
        key = tl.where(key < floor, 0, key).to(tl.uint32)
    if code_ptr is not None:
        code = tl.load(code_ptr + offs, mask=mask, other=2)
        key = tl.where(code == 1, FORCED, tl.where(code == 0, key, 0)).to(tl.uint32)
    return tl.where(mask, key, 0).to(tl.uint32)


@triton.jit
def _count_keys(row, keys, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr):
    """How many positions are forced, and how many compete."""
    forced = tl.zeros((), tl.int32)
    competing = tl.zeros((), tl.int32)
    for start in range(0, row[3], CHUNK):
        if not ONE_CHUNK:
            keys = _load_keys(row, start + tl.arange(0, CHUNK))
        forced += tl.sum((keys == FORCED).to(tl.int32), 0)
        competing += tl.sum(((keys != FORCED) & (keys != 0)).to(tl.int32), 0)
    return forced, competing


@triton.jit
def _kth_largest(row, keys, kth, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr):
    """The kth largest key (1-based), and how many keys equal to it belong to the kth largest."""
    bins = tl.arange(0, 256)
    threshold = tl.zeros((), tl.uint32)
    known = tl.zeros((), tl.uint32)  # the bits of the threshold decided so far
    for step in range(4):
        shift = (24 - 8 * step + tl.zeros((), tl.int32)).to(tl.uint32)
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, row[3], CHUNK):
            if not ONE_CHUNK:
                keys = _load_keys(row, start + tl.arange(0, CHUNK))
            digit = ((keys >> shift) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=(keys & known) == threshold)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit_k = tl.sum((at_least >= kth).to(tl.int32), 0) - 1
        kth -= tl.sum(tl.where(bins == digit_k, at_least - counts, 0), 0)
        threshold = threshold | (digit_k.to(tl.uint32) << shift)
        known = known | (tl.full((), 255, tl.uint32) << shift)
    return threshold, kth


@triton.jit
def _last_kept(row, keys, quota, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr):
    """The smallest kept key, how many keys equal to it are kept, and how many positions in all."""
    forced = tl.zeros((), tl.int32)
    competing = forced + row[3]
    if (row[1] is not None) or (row[4] is not None):
        forced, competing = _count_keys(row, keys, CHUNK, ONE_CHUNK)
    need = forced + tl.minimum(tl.maximum(quota, 0), competing.to(tl.int64)).to(tl.int32)

    threshold = tl.zeros((), tl.uint32)  # everything above it is kept: all keys that are there
    ties = tl.zeros((), tl.int32)
    if need < forced + competing:
        threshold, ties = _kth_largest(row, keys, tl.maximum(need, 1), CHUNK, ONE_CHUNK)
        threshold = tl.where(need > 0, threshold, FORCED).to(tl.uint32)
        ties = tl.where(need > 0, ties, 0)
    return threshold, ties, need


@triton.jit
def _kept_before(keys, threshold, ties, n_above, n_equal):
    """Of a chunk of keys: which are kept, their slots, and the counts above and equal to the threshold after it."""
    above = (keys > threshold).to(tl.int32)
    equal = (keys == threshold).to(tl.int32)
    packed = (above << 16) | equal
    before = tl.cumsum(packed, 0) - packed
    equal_before = n_equal + (before & 0xFFFF)
    slot = n_above + (before >> 16) + tl.minimum(equal_before, ties)
    kept = (keys > threshold) | ((keys == threshold) & (equal_before < ties))
    return kept, slot, n_above + tl.sum(above, 0), n_equal + tl.sum(equal, 0)


@triton.jit
def _select_row(row, quota, index_ptr, first, width, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr):
    """Write ``first`` + the kept positions of a row, ascending, and -1 behind them; return how many are kept."""
    keys = _load_keys(row, tl.arange(0, CHUNK))
    threshold, ties, need = _last_kept(row, keys, quota, CHUNK, ONE_CHUNK)
    n_above = tl.zeros((), tl.int32)
    n_equal = tl.zeros((), tl.int32)
    for start in range(0, row[3], CHUNK):
        offs = start + tl.arange(0, CHUNK)
        if not ONE_CHUNK:
            keys = _load_keys(row, offs)
        kept, slot, n_above, n_equal = _kept_before(keys, threshold, ties, n_above, n_equal)
        tl.store(index_ptr + slot, first + offs.to(tl.int64), mask=kept & (slot < width))
    for start in range(0, width, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        tl.store(index_ptr + offs, tl.full((CHUNK,), -1, tl.int64), mask=(offs >= need) & (offs < width))
    return need


@triton.jit(do_not_specialize=["keep", "width"])
def _select_topk_kernel(
    scores_ptr,  # [B, N]
    keep,  # int, or a pointer to [B] int64, contiguous
    code_ptr,  # [B, N] int8, contiguous, or None
    threshold,  # float, or a pointer to [B] float32, contiguous, or None
    index_ptr,  # [B, width] int64, contiguous
    count_ptr,  # [B] int64
    N,
    width,
    stride_sb,
    stride_sn,
    KEEP_ON_DEVICE: tl.constexpr,
    THRESHOLD_ON_DEVICE: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    quota = tl.zeros((), tl.int64) + (tl.load(keep + b) if KEEP_ON_DEVICE else keep)
    if code_ptr is not None:
        code_ptr += b * N
    scores_ptr += b * stride_sb
    row = (scores_ptr, code_ptr, stride_sn, N, None)
    if threshold is not None:
        level = tl.load(threshold + b) if THRESHOLD_ON_DEVICE else threshold
        floor = _order_key(tl.zeros((), tl.float32) + level)
        floor = tl.where(floor == NAN_KEY, FORCED, floor).to(tl.uint32)  # no score reaches NaN
        row = (scores_ptr, code_ptr, stride_sn, N, floor)
    count = _select_row(row, quota, index_ptr + b * width, 0, width, CHUNK, ONE_CHUNK)
    tl.store(count_ptr + b, count.to(tl.int64))


def tiles(N, max_chunk=MAX_CHUNK):
    """Chunk and warps for rows of ``N`` scores."""
    chunk = min(max(triton.next_power_of_2(N), MIN_CHUNK), max_chunk)
    return {"CHUNK": chunk, "ONE_CHUNK": max_chunk >= N, "num_warps": max(4, chunk // KEYS_PER_WARP)}


def select_topk(scores, keep, code, width, threshold=None):
    """Allocate and launch one program a row. Arguments were validated by vlmprune.ops.select_topk."""
    B, N = scores.shape
    if B * N == 0:
        index = torch.full((B, width), -1, dtype=torch.int64, device=scores.device)
        return index, torch.zeros(B, dtype=torch.int64, device=scores.device)
    index = torch.empty((B, width), dtype=torch.int64, device=scores.device)
    count = torch.empty(B, dtype=torch.int64, device=scores.device)
    code, keep, threshold = (
        x.contiguous() if isinstance(x, torch.Tensor) else x for x in (code, keep, threshold)
    )
    on_device = {
        "KEEP_ON_DEVICE": isinstance(keep, torch.Tensor),
        "THRESHOLD_ON_DEVICE": isinstance(threshold, torch.Tensor),
    }
    args = (scores, keep, code, threshold, index, count, N, width, *scores.stride())
    launch(_select_topk_kernel, (B,), *args, **on_device, **tiles(N), **REGISTERS)
    return index, count
