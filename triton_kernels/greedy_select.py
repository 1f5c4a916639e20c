"""Greedy selection: K times, choose the token of largest value, then lower the values of those it makes superfluous.

The cosines of all pairs are computed first, by many programs: maxmin's first choice and every coverage gain need them all.
Choosing is a chain of K dependent steps, latency bound: one persistent program a sample holds the values in scratch of
its own and reads one row of cosines a step ("dpp" also the rows of its Cholesky factor so far). A step updates the values
and finds the next largest in the same pass.
Gains of "coverage" can only fall, so an old gain is an upper bound: only a token that leads with an old one is evaluated.
Values: -inf = chosen or padding. No atomics; every thread rereads only what it wrote, or what a barrier has published.
Tile: CHUNK tokens. Grid: first values (N, B), choosing (B,).
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import as_bytes
from vlmprune.triton_kernels.pairwise_cosine import pairwise_cosine
from vlmprune.triton_kernels.select_topk import REGISTERS

MIN_CHUNK, MAX_CHUNK = 128, 2048
VALUES_PER_WARP = 128  # one 16-byte load a thread
RANK_TOLERANCE = tl.constexpr(1e-5)  # a smaller share of the diagonal is rounding: the token adds nothing


@triton.jit
def _coverage_gain(row_ptr, covered_ptr, N, CHUNK: tl.constexpr):
    """How much better all tokens would be covered; without covered_ptr nothing is covered yet."""
    gain = tl.zeros((), tl.float32)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        better = tl.load(row_ptr + offs, mask=offs < N, other=0.0)
        if covered_ptr is not None:
            better -= tl.load(covered_ptr + offs, mask=offs < N, other=0.0)
        gain += tl.sum(tl.maximum(better, 0.0), 0)
    return gain


@triton.jit
def _first_values_kernel(
    cos_ptr,  # [B, N, N] float32, contiguous
    mask_ptr,  # [B, N] uint8, contiguous, or None
    relevance_ptr,  # [B, N] float32, contiguous; read by coverage
    value_ptr,  # [B, N] float32, contiguous
    N,
    COVERAGE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The value of choosing token n first."""
    n, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_ptr = cos_ptr + (b * N + n) * N
    if COVERAGE:
        value = tl.load(relevance_ptr + b * N + n) * _coverage_gain(row_ptr, None, N, CHUNK)
    else:
        value = tl.full((), float("inf"), tl.float32)
        for start in range(0, N, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            other = (offs < N) & (offs != n)
            if mask_ptr is not None:
                other = other & (tl.load(mask_ptr + b * N + offs, mask=offs < N, other=0) != 0)
            gap = 1.0 - tl.load(row_ptr + offs, mask=offs < N, other=0.0)
            value = tl.minimum(value, tl.min(tl.where(other, gap, float("inf")), 0))
    if mask_ptr is not None:
        value = tl.where(tl.load(mask_ptr + b * N + n) != 0, value, float("-inf"))
    tl.store(value_ptr + b * N + n, value)


@triton.jit
def _better(value, best, values, start):
    """The larger of a running best and the best of a chunk; ties keep the lower position."""
    top, at = tl.max(values, 0, return_indices=True)
    return tl.maximum(value, top), tl.where(top > value, start + at, best)


@triton.jit
def _largest(value_ptr, N, CHUNK: tl.constexpr):
    """(value, position) of the largest value; (-inf, 0) if none is left."""
    value = tl.full((), float("-inf"), tl.float32)
    best = tl.zeros((), tl.int32)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        values = tl.load(value_ptr + offs, mask=offs < N, other=float("-inf"))
        value, best = _better(value, best, values, start)
    return value, best


# A sample is (cos_ptr, relevance_ptr, value_ptr, state_ptr, N), the pointers those of _greedy_select_kernel at its rows.


@triton.jit
def _evaluated_largest(value, best, sample, CHUNK: tl.constexpr):
    """Replace old gains by true ones until a true one leads."""
    cos_ptr, relevance_ptr, value_ptr, covered_ptr, N = sample
    evaluated = best - 1
    while (best != evaluated) & (value > float("-inf")):
        evaluated = best
        gain = _coverage_gain(cos_ptr + best.to(tl.int64) * N, covered_ptr, N, CHUNK)
        tl.debug_barrier()  # all have read the old gain
        tl.store(value_ptr + best, gain * tl.load(relevance_ptr + best))
        tl.debug_barrier()
        value, best = _largest(value_ptr, N, CHUNK)
    return value, best


@triton.jit
def _factor_row(cos, r, r_best, pivot, best, factor_ptr, step, offs, N):
    """Row ``step`` of the Cholesky factor at ``offs``: 0 once the chosen tokens span the rest."""
    row = r * r_best * cos
    for s in range(0, step):
        earlier = factor_ptr + (s + tl.zeros((), tl.int64)) * N
        row -= tl.load(earlier + best) * tl.load(earlier + offs, mask=offs < N, other=0.0)
    spans = pivot > 0.0
    return tl.where(spans, row / tl.sqrt(tl.where(spans, pivot, 1.0)), 0.0)


@triton.jit
def _choose(value, best, step, sample, threshold, RULE: tl.constexpr, CHUNK: tl.constexpr):
    """Choose ``best``, update every value, and return the next largest (value, position)."""
    cos_ptr, relevance_ptr, value_ptr, state_ptr, N = sample
    row_ptr = cos_ptr + best.to(tl.int64) * N
    next_value = tl.full((), float("-inf"), tl.float32)
    next_best = tl.zeros((), tl.int32)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        mask = offs < N
        old = tl.load(value_ptr + offs, mask=mask, other=float("-inf"))
        cos = tl.load(row_ptr + offs, mask=mask, other=0.0)
        if RULE == "maxmin":
            new = tl.where(step == 0, 1.0 - cos, tl.minimum(old, 1.0 - cos))
        elif RULE == "dpp":
            r = tl.load(relevance_ptr + offs, mask=mask, other=0.0)
            r_best = tl.load(relevance_ptr + best)
            row = _factor_row(cos, r, r_best, value, best, state_ptr, step, offs, N)
            tl.store(state_ptr + (step + tl.zeros((), tl.int64)) * N + offs, row, mask=mask)
            new = old - row * row
            # in this order, as Triton 3.7's interpreter does not multiply a constexpr by a tensor
            new = tl.where(new <= r * RANK_TOLERANCE * r, 0.0, new)
        elif RULE == "coverage":
            covered = tl.load(state_ptr + offs, mask=mask, other=0.0)
            tl.store(state_ptr + offs, tl.maximum(covered, cos), mask=mask)
            new = old
        else:  # nms: a place among those that are too close to a chosen token is N lower
            new = tl.where((old > N) & (cos > threshold), old - N, old)
        new = tl.where((offs == best) | (old == float("-inf")), float("-inf"), new)
        tl.store(value_ptr + offs, new, mask=mask)
        next_value, next_best = _better(next_value, next_best, new, start)
    tl.debug_barrier()  # the next step reads single numbers that other threads wrote
    return next_value, next_best


@triton.jit(do_not_specialize=["keep", "state_rows"])
def _greedy_select_kernel(
    cos_ptr,  # [B, N, N] float32, contiguous
    mask_ptr,  # [B, N] uint8, contiguous, or None
    relevance_ptr,  # [B, N] float32, contiguous; read by dpp and coverage
    value_ptr,  # [B, N] float32, contiguous: value of each token as the first choice; scratch
    state_ptr,  # dpp [B, keep, N], the Cholesky factor; coverage [B, N] zeros; float32, contiguous
    index_ptr,  # [B, keep] int64, contiguous
    order_ptr,  # [B, keep] int64, contiguous
    N,
    keep,
    state_rows,
    threshold,
    RULE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    value_ptr += b * N
    state_ptr += b * state_rows * N
    sample = (cos_ptr + b * N * N, relevance_ptr + b * N, value_ptr, state_ptr, N)
    value, best = _largest(value_ptr, N, CHUNK)
    for step in range(0, keep):
        if RULE == "coverage":
            value, best = _evaluated_largest(value, best, sample, CHUNK)
        tl.store(order_ptr + b * keep + step, tl.where(value > float("-inf"), best, -1).to(tl.int64))
        if value > float("-inf"):
            value, best = _choose(value, best, step, sample, threshold, RULE, CHUNK)

    count = tl.zeros((), tl.int32)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        chosen = tl.load(value_ptr + offs, mask=offs < N, other=0.0) == float("-inf")
        if mask_ptr is not None:
            chosen = chosen & (tl.load(mask_ptr + b * N + offs, mask=offs < N, other=0) != 0)
        taken = chosen.to(tl.int32)
        slot = count + tl.cumsum(taken, 0) - taken
        tl.store(index_ptr + b * keep + slot, offs.to(tl.int64), mask=chosen)
        count += tl.sum(taken, 0)
    for start in range(0, keep, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        rest = (offs >= count) & (offs < keep)
        tl.store(index_ptr + b * keep + offs, tl.full((CHUNK,), -1, tl.int64), mask=rest)


def tiles(N):
    """Chunk and warps for rows of ``N`` values."""
    chunk = min(max(triton.next_power_of_2(N), MIN_CHUNK), MAX_CHUNK)
    return {"CHUNK": chunk, "num_warps": max(4, chunk // VALUES_PER_WARP)}


def _clean(rule, relevance, ok):
    """Relevance as the kernels read it: finite float32; for nms 2 N for the most relevant, then one less each."""
    if rule == "nms":
        r = relevance.float().nan_to_num(float("-inf"), float("inf"), float("-inf"))
        place = r.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (2 * place.shape[1] - place).float()
    if relevance is None:
        return ok.float()
    r = relevance.float().nan_to_num(0.0, 0.0, 0.0)
    return torch.where(ok, r, 0.0) if rule == "dpp" else r.clamp(min=0).contiguous()


def greedy_select(features, keep, rule, relevance, threshold, mask):
    """Allocate, launch the three kernels. Arguments were validated by vlmprune.ops.greedy_select."""
    (B, N), device = features.shape[:2], features.device
    index = torch.empty((B, keep), dtype=torch.int64, device=device)
    order = torch.empty_like(index)
    if index.numel() == 0:
        return index, order
    cos, ok = pairwise_cosine(features, mask)
    relevance, mask_bytes, config = _clean(rule, relevance, ok), as_bytes(mask), tiles(N)
    if rule in ("maxmin", "coverage"):
        value = torch.empty((B, N), dtype=torch.float32, device=device)
        coverage = rule == "coverage"
        _first_values_kernel[(N, B)](cos, mask_bytes, relevance, value, N, COVERAGE=coverage, **config)
    else:
        value = relevance * relevance if rule == "dpp" else relevance.clone()
        value = value if mask is None else value.masked_fill(~mask, float("-inf"))
    state_rows = {"dpp": keep, "coverage": 1}.get(rule, 0)
    state = torch.zeros((B, state_rows, N), dtype=torch.float32, device=device)
    args = (cos, mask_bytes, relevance, value, state, index, order, N, keep, state_rows, threshold)
    _greedy_select_kernel[(B,)](*args, RULE=rule, **REGISTERS, **config)
    return index, order
