"""From the parts of a sample to its survivors: what the last program of the score kernel to arrive does for a sample."""

import triton
import triton.language as tl

from vlmprune.triton_kernels._score import max_over_rows, max_with_nan

PARTS_AT_ONCE = tl.constexpr(8)  # loads in flight while parts are joined


@triton.jit
def join_parts(
    part_ptr,  # [PARTS, N] float32, this sample's
    offs,
    N,
    PARTS: tl.constexpr,
    REDUCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum or maximum over the parts at columns ``offs``, always in the same order: [CHUNK] float32."""
    acc = tl.full((CHUNK,), float("-inf") if REDUCE == "max" else 0.0, tl.float32)
    NAN: tl.constexpr = float("nan")
    for first in range(0, PARTS, PARTS_AT_ONCE):
        part = first + tl.arange(0, PARTS_AT_ONCE)
        ok = part < PARTS
        x_offs = part.to(tl.int64)[:, None] * N + offs[None, :]
        mask = ok[:, None] & (offs < N)[None, :]
        other = float("-inf") if REDUCE == "max" else 0.0
        x = tl.load(part_ptr + x_offs, mask=mask, other=other, cache_modifier=".cg")
        acc = max_with_nan(acc, max_over_rows(x, NAN)) if REDUCE == "max" else acc + tl.sum(x, 0)
    return acc


@triton.jit
def code_positions(key_mask_ptr, spread_ptr, code_ptr, length, max_seqlen, CHUNK: tl.constexpr):
    """Before the columns are entered: score 0, and kept (1) unless masked or behind the end (2)."""
    for start in range(0, max_seqlen, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        visible = offs < length
        if key_mask_ptr is not None:
            visible = visible & (tl.load(key_mask_ptr + offs, mask=visible, other=0) != 0)
        tl.store(code_ptr + offs, tl.where(visible, 1, 2).to(tl.int8), mask=offs < max_seqlen)
        tl.store(spread_ptr + offs, tl.zeros((CHUNK,), tl.float32), mask=offs < max_seqlen)


@triton.jit
def enter_columns(score, column, key_mask_ptr, spread_ptr, code_ptr, length, CHUNK: tl.constexpr):
    """Let the columns compete at their positions."""
    ok = (column >= 0) & (column < length)
    if key_mask_ptr is not None:
        ok = ok & (tl.load(key_mask_ptr + column, mask=ok, other=0) != 0)
    tl.store(spread_ptr + column, score, mask=ok)
    tl.store(code_ptr + column, tl.zeros((CHUNK,), tl.int8), mask=ok)


@triton.jit
def _dropped_before(columns_ptr, keep, samples, N, KEEP_ON_DEVICE: tl.constexpr, CHUNK: tl.constexpr):
    """How many positions the first ``samples`` samples of a packed batch lose: their real columns beyond the quota."""
    dropped = tl.zeros((), tl.int32)
    for start in range(0, samples * N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        real = tl.load(columns_ptr + offs, mask=offs < samples * N, other=-1) >= 0
        quota = tl.zeros((CHUNK,), tl.int64) + keep
        if KEEP_ON_DEVICE:
            quota = tl.load(keep + offs // N, mask=offs < samples * N, other=0)
        dropped += tl.sum((real & (offs % N >= quota)).to(tl.int32), 0)
    return dropped


@triton.jit
def place_of_sample(
    columns_ptr,
    keep,
    b,
    start_k,
    length,
    N,
    width,
    cu_seqlens_out_ptr,
    KEEP_ON_DEVICE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(first slot, slots) of sample b of a packed batch, behind those before it; writes where it ends."""
    first = (start_k - _dropped_before(columns_ptr, keep, b, N, KEEP_ON_DEVICE, CHUNK)).to(tl.int32)
    last = start_k + length - _dropped_before(columns_ptr, keep, b + 1, N, KEEP_ON_DEVICE, CHUNK)
    end = tl.zeros((), tl.int32) + width
    if b < tl.num_programs(2) - 1:  # the last sample fills up what is left
        end = tl.minimum(last.to(tl.int32), end)
    tl.store(cu_seqlens_out_ptr + b + 1, last)
    if b == 0:
        tl.store(cu_seqlens_out_ptr, 0)
    return first, tl.maximum(end - first, 0)
