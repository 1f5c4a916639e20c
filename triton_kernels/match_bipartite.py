"""Bipartite soft matching (ToMe): each source's best destination by cosine; the sources of the r best pairs merge.

Compute bound: products on tensor cores, float32 sums. Of a tile only its rows' maxima leave the registers: no [N, N] tensor.
Which pairs merge is select_topk's threshold problem; a prefix sum over the survivors then numbers them in position order.
Tile: BLOCK sources x BLOCK destinations, D in pieces of BLOCK_D; then CHUNK positions.
Grid: matching (B, cdiv(sources, BLOCK), up to MAX_SPLITS shares of the destinations), numbering (B,). No atomics.
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import registers
from vlmprune.triton_kernels.pairwise_cosine import BLOCK, cosine_tile, inverse_norm
from vlmprune.triton_kernels.pairwise_cosine import tiles as cosine_tiles
from vlmprune.triton_kernels.select_topk import LONG_CHUNK, MAX_WARPS, _kept_before, _last_kept, _load_keys
from vlmprune.triton_kernels.select_topk import tiles as select_tiles

MAX_SPLITS = 8  # of the destinations: enough programs for a GPU at 576 tokens, little to join at 32k


@triton.jit
def _role(role_ptr, offs, N):
    """0 = source, 1 = destination, 2 = padding or past the end; by default every other token is a destination."""
    if role_ptr is not None:
        role = tl.load(role_ptr + offs, mask=offs < N, other=2).to(tl.int32)
    else:
        role = tl.where(offs < N, offs % 2, 2)
    return role


@triton.jit
def _best_match_kernel(
    x_ptr,  # [B, N, D], last dim contiguous
    inverse_ptr,  # [B, N] float32, 1 / norm, 0 = cosine 0 to all; contiguous
    role_ptr,  # [B, N] int8, contiguous, or None
    destinations_ptr,  # [B, M] int64, contiguous, or None: the odd positions
    best_ptr,  # [B, splits, N] float32, contiguous: largest cosine to a destination, -inf = none
    match_ptr,  # [B, splits, N] int32, contiguous: which
    N,
    M,
    D,
    stride_xb,
    stride_xn,
    STEP: tl.constexpr,  # between two sources
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    source = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)) * STEP
    x_ptr += b * stride_xb
    inverse_ptr += b * N
    row_m = x_ptr + source.to(tl.int64) * stride_xn
    inverse_m = tl.load(inverse_ptr + source, mask=source < N, other=0.0)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    match = tl.full((BLOCK,), -1, tl.int32)
    share = tl.cdiv(tl.cdiv(M, BLOCK), splits) * BLOCK
    for start in range(split * share, tl.minimum(split * share + share, M), BLOCK):
        offs = start + tl.arange(0, BLOCK)
        if destinations_ptr is not None:
            position = tl.load(destinations_ptr + b * M + offs, mask=offs < M, other=-1)
            position = tl.where((position >= 0) & (position < N), position, N).to(tl.int32)
        else:
            position = tl.where(offs < M, 2 * offs + 1, N)
        if role_ptr is not None:
            position = tl.where(_role(role_ptr + b * N, position, N) == 1, position, N)
        inverse_n = tl.load(inverse_ptr + position, mask=position < N, other=0.0)
        row_n = x_ptr + position.to(tl.int64) * stride_xn
        cos = cosine_tile(row_m, row_n, inverse_m, inverse_n, D, DTYPE, BLOCK, BLOCK_D)
        cos = tl.where((position < N)[None, :], cos, float("-inf"))  # [BLOCK, BLOCK]
        top = tl.max(cos, 1)
        lowest = tl.min(tl.where(cos == top[:, None], position[None, :], N), 1)
        better = (top > best) | ((top == best) & (lowest < match))
        match = tl.where(better, lowest, match)
        best = tl.where(better, top, best)
    out = (b * splits + split) * N + source
    tl.store(best_ptr + out, best, mask=source < N)
    tl.store(match_ptr + out, match, mask=source < N)


@triton.jit
def _join_matches(best_ptr, match_ptr, role_ptr, code_ptr, N, splits, CHUNK: tl.constexpr):
    """The best of all shares, into the first one; code 0 = a source that has a destination, 2 = anything else."""
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        source = _role(role_ptr, offs, N) == 0
        best = tl.load(best_ptr + offs, mask=source, other=float("-inf"))
        match = tl.load(match_ptr + offs, mask=source, other=-1)
        for split in range(1, splits):
            at = (split + tl.zeros((), tl.int64)) * N + offs
            value = tl.load(best_ptr + at, mask=source, other=float("-inf"))
            other = tl.load(match_ptr + at, mask=source, other=-1)
            better = (value > best) | ((value == best) & (other < match))
            match = tl.where(better, other, match)
            best = tl.where(better, value, best)
        tl.store(best_ptr + offs, best, mask=source)
        tl.store(match_ptr + offs, match, mask=source)
        tl.store(code_ptr + offs, tl.where(match >= 0, 0, 2).to(tl.int8), mask=offs < N)


@triton.jit
def _number_kernel(
    best_ptr,  # [B, splits, N] float32, contiguous, of each source
    match_ptr,  # [B, splits, N] int32, contiguous
    role_ptr,  # [B, N] int8, contiguous, or None
    code_ptr,  # [B, N] int8, contiguous: scratch
    assignment_ptr,  # [B, N] int64, contiguous
    index_ptr,  # [B, width] int64, contiguous
    N,
    splits,
    r,
    width,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    best_ptr += b * splits * N
    match_ptr += b * splits * N
    code_ptr += b * N
    assignment_ptr += b * N
    if role_ptr is not None:
        role_ptr += b * N
    _join_matches(best_ptr, match_ptr, role_ptr, code_ptr, N, splits, CHUNK)
    tl.debug_barrier()  # other threads than wrote them read the scores, the codes and the matches
    index_ptr += b * width
    row = (best_ptr, code_ptr, 1, N, None)
    keys = _load_keys(row, tl.arange(0, KEYS))
    threshold, ties, _merges = _last_kept(row, keys, tl.zeros((), tl.int64) + r, KEYS, IN_REGISTERS)
    n_above = tl.zeros((), tl.int32)
    n_equal = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32)
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        part = keys if IN_REGISTERS and KEYS == CHUNK else _load_keys(row, offs)
        merged, _, n_above, n_equal = _kept_before(part, threshold, ties, n_above, n_equal)
        role = _role(role_ptr, offs, N)
        stays = tl.where(merged, 0, (role < 2).to(tl.int32))
        slot = count + tl.cumsum(stays, 0) - stays
        match = tl.load(match_ptr + offs, mask=merged, other=-1)
        assigned = tl.where(stays > 0, slot, tl.where(merged, -2 - match, -1))  # -2 - destination: it merges
        tl.store(assignment_ptr + offs, assigned.to(tl.int64), mask=offs < N)
        tl.store(index_ptr + slot, offs.to(tl.int64), mask=(stays > 0) & (slot < width))
        count += tl.sum(stays, 0)
    for start in range(0, width, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        tl.store(index_ptr + offs, tl.full((CHUNK,), -1, tl.int64), mask=(offs >= count) & (offs < width))
    tl.debug_barrier()  # and the slots of the destinations, which never merge
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        assigned = tl.load(assignment_ptr + offs, mask=offs < N, other=-1)
        slot = tl.load(assignment_ptr - 2 - assigned, mask=assigned < -1, other=-1)
        tl.store(assignment_ptr + offs, slot, mask=assigned < -1)


def _roles(B, N, destinations, mask, device):
    """[B, N] int8: 0 = source, 1 = destination, 2 = padding; positions outside the row are no destinations."""
    if destinations is None:
        role = (torch.arange(N, device=device) % 2).to(torch.int8).expand(B, N)
    else:
        at = torch.where((destinations >= 0) & (destinations < N), destinations, N)
        role = torch.zeros((B, N + 1), dtype=torch.int8, device=device).scatter_(1, at, 1)[:, :N]
    return (role if mask is None else role.masked_fill(~mask, 2)).contiguous()


def match_bipartite(features, r, destinations, mask, width):
    """Allocate, launch both kernels. Arguments were validated by vlmprune.ops.match_bipartite."""
    (B, N, D), device = features.shape, features.device
    assignment = torch.empty((B, N), dtype=torch.int64, device=device)
    index = torch.empty((B, width), dtype=torch.int64, device=device)
    if assignment.numel() == 0:
        return assignment, index
    given = destinations is not None
    if given:
        destinations = destinations.expand(B, -1).contiguous()
    role = _roles(B, N, destinations, mask, device) if given or mask is not None else None
    M, step = (destinations.shape[1], 1) if given else (N // 2, 2)
    splits = min(MAX_SPLITS, max(triton.cdiv(M, BLOCK), 1))
    best = torch.empty((B, splits, N), dtype=torch.float32, device=device)
    match = torch.empty((B, splits, N), dtype=torch.int32, device=device)
    tiles = cosine_tiles(features)
    grid, inverse = (B, triton.cdiv(triton.cdiv(N, step), BLOCK), splits), inverse_norm(features, mask)
    args = (features, inverse, role, destinations, best, match, N, M, D, *features.stride()[:2])
    _best_match_kernel[grid](*args, STEP=step, **tiles, **registers(255))
    code = torch.empty((B, N), dtype=torch.int8, device=device)
    config = select_tiles(N, LONG_CHUNK)
    config |= registers(128 if config["num_warps"] == MAX_WARPS else 255)
    _number_kernel[(B,)](best, match, role, code, assignment, index, N, splits, r, width, **config)
    return assignment, index
