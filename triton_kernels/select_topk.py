"""Exact top-k in position order: index[b] = ascending positions of the keep[b] best scores and of every forced one.

Latency bound: a row is a few thousand numbers. One threshold problem: each position gets a 32-bit key whose integer
order is the score order (forced = largest, dropped or below the threshold = 0), a search that counts the keys above a level
finds the smallest kept key, and a prefix sum over "kept" gives every survivor its slot, already sorted.
Ties go to the lower position.
Tile: CHUNK positions; a row that fits one chunk is read once and stays in registers. Grid: (B,).
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import registers, spread
from vlmprune.triton_kernels._launch import launch

MIN_CHUNK, MAX_CHUNK = (
    128,
    4096,
)  # positions of a row that is done in one pass; two 16-bit counts share one scan
LONG_CHUNK = 2048  # positions per pass of a longer one
MAX_KEYS = 16384  # of a row, which then stay in registers, 32 a thread at 16 warps
KEYS_PER_WARP = 512
MAX_WARPS = 16
FOLD = tl.constexpr(1024)
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
    score = tl.load(scores_ptr + offs.to(tl.int64) * stride_sn, mask=mask, other=0)
    key = _order_key(score)
    if score.dtype != tl.int32:
        key = tl.where(mask, key, 0).to(tl.uint32)
    if floor is not None:
        key = tl.where(key < floor, 0, key).to(tl.uint32)
    if code_ptr is not None:
        code = tl.load(code_ptr + offs, mask=mask, other=2)
        key = tl.where(code == 1, FORCED, tl.where(code == 0, key, 0)).to(tl.uint32)
    return key


@triton.jit
def _survey(row, keys, KEYS: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """How many positions are forced and how many compete; of those, the smallest and the largest key (else any)."""
    forced = tl.zeros((), tl.int32)
    there = tl.zeros((), tl.int32)
    below = tl.full((), FORCED, tl.uint32)  # one below the smallest: 0 is then the largest number
    beyond = tl.zeros((), tl.uint32)  # one above the largest: FORCED is then 0
    for start in range(0, KEYS if IN_REGISTERS else row[3], KEYS):  # once: no loop at all
        if not IN_REGISTERS:
            keys = _load_keys(row, start + tl.arange(0, KEYS))
        forced += tl.sum((keys == FORCED).to(tl.int32), 0)
        there += tl.sum((keys != 0).to(tl.int32), 0)
        below = tl.minimum(below, tl.min((keys - 1).to(tl.uint32), 0))
        beyond = tl.maximum(beyond, tl.max((keys + 1).to(tl.uint32), 0))
    return forced, there - forced, (below + 1).to(tl.uint32), (beyond - 1).to(tl.uint32)


@triton.jit
def _count_from(row, keys, level, KEYS: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """How many keys are at least ``level``."""
    if IN_REGISTERS:
        return tl.sum((keys >= level).to(tl.int32), 0)
    # folded to few counts: what a loop carries costs a move for each number and round
    WIDTH: tl.constexpr = KEYS if KEYS <= FOLD else FOLD
    count = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, row[3], KEYS):
        keys = _load_keys(row, start + tl.arange(0, KEYS))
        count += tl.sum(tl.reshape((keys >= level).to(tl.int32), (KEYS // WIDTH, WIDTH)), 0)
    return tl.sum(count, 0)


@triton.jit
def _last_kept(row, keys, quota, KEYS: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """Keys above the first result are kept, of those equal to it as many as the second, and the third in all.

    Regula falsi: each round counts the keys from a level between the bounds of the smallest kept key, as far up as the
    counts at the bounds suggest and a quarter of the way from there to the middle; where that left more than three quarters
    of the interval, the next level is the middle. It ends where no key lies between the kept and the others: after some 7 to
    12 rounds as a rule, some 30 if many keys are equal there, and never after more than 80.
    """
    forced, competing, low, high = _survey(row, keys, KEYS, IN_REGISTERS)
    need = forced + tl.minimum(tl.maximum(quota, 0), competing.to(tl.int64)).to(tl.int32)
    from_low = forced + competing  # keys at least low: at least as many as needed
    above = forced  # keys above high: fewer, or no more is needed
    halve = tl.full((), False, tl.int1)
    while (low < high) & (from_low != need) & (above != need):
        reach = high - low
        share = 0.75 * ((from_low - need) + 0.5) / (from_low - above) + 0.125
        step = (reach.to(tl.float32) * tl.where(halve, 0.5, share)).to(tl.uint32)
        level = low + tl.minimum(tl.maximum(step, 1), reach)
        count = _count_from(row, keys, level, KEYS, IN_REGISTERS)
        if count >= need:
            low, from_low = level, count
        else:
            high, above = level - 1, count
        halve = high - low > reach - reach // 4
    # from_low first: where nothing competes, high may be any
    threshold = tl.where(from_low == need, low - 1, tl.where(above == need, high, low)).to(tl.uint32)
    ties = tl.where((from_low == need) | (above == need), 0, need - above)
    return threshold, ties, need


@triton.jit
def _kept_before(keys, threshold, ties, n_above, n_equal):
    """Of a chunk of keys: which are kept, their slots, and the counts above and equal to the threshold after it."""
    above = (keys > threshold).to(tl.int32)
    equal = (keys == threshold).to(tl.int32)
    packed = (above << 16) | equal
    before, all_of_it = tl.cumsum(packed, 0) - packed, tl.sum(packed, 0)
    equal_before = n_equal + (before & 0xFFFF)
    slot = n_above + (before >> 16) + tl.minimum(equal_before, ties)
    kept = (keys > threshold) | ((keys == threshold) & (equal_before < ties))
    return kept, slot, n_above + (all_of_it >> 16), n_equal + (all_of_it & 0xFFFF)


@triton.jit
def _select_row(
    row,
    quota,
    index_ptr,
    first,
    width,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """Write ``first`` + the kept positions of a row, ascending, and -1 behind them; return how many are kept."""
    keys = _load_keys(row, tl.arange(0, KEYS))
    threshold, ties, need = _last_kept(row, keys, quota, KEYS, IN_REGISTERS)
    n_above = tl.zeros((), tl.int32)
    n_equal = tl.zeros((), tl.int32)
    ONE_PASS: tl.constexpr = IN_REGISTERS and KEYS == CHUNK
    for start in range(0, CHUNK if ONE_PASS else row[3], CHUNK):
        offs = start + tl.arange(0, CHUNK)
        part = keys if ONE_PASS else _load_keys(row, offs)
        kept, slot, n_above, n_equal = _kept_before(part, threshold, ties, n_above, n_equal)
        slot = spread(tl.where(kept & (slot < width), slot, -1))
        tl.store(index_ptr + slot, first + offs.to(tl.int64), mask=slot >= 0)
    for start in range(0, width, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        tl.store(index_ptr + offs, tl.full((CHUNK,), -1, tl.int64), mask=(offs >= need) & (offs < width))
    return need


@triton.jit(do_not_specialize=["keep", "N", "width", "stride_sb"])
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
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
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
    count = _select_row(row, quota, index_ptr + b * width, 0, width, KEYS, CHUNK, IN_REGISTERS)
    tl.store(count_ptr + b, count.to(tl.int64))


def tiles(N, max_chunk=MAX_CHUNK):
    """Keys in registers, positions per pass, and warps for rows of ``N`` scores."""
    padded = max(triton.next_power_of_2(N), MIN_CHUNK)
    stay = padded <= MAX_KEYS
    keys = padded if stay else MAX_CHUNK
    return {
        "KEYS": keys,
        "CHUNK": padded if padded <= max_chunk else LONG_CHUNK,
        "IN_REGISTERS": stay,
        "num_warps": min(max(4, keys // KEYS_PER_WARP), MAX_WARPS) if stay else MAX_WARPS,
    }


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
