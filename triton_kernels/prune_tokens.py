"""Score, select and gather in a row, with nothing waiting for the host: the launchers of the three ops and one kernel.

The kernel turns the columns' scores into a selection over all S positions: scores[b, columns[n]] compete (code 0),
masked positions are dropped (code 2), every other position is kept (code 1).
Latency bound. One program owns a sample, so that writing the columns can follow writing the defaults.
Tile: CHUNK positions. Grid: (B,).
"""

import torch
import triton
import triton.language as tl

from vlmprune.triton_kernels._device import as_bytes
from vlmprune.triton_kernels.gather_tokens import gather_tokens
from vlmprune.triton_kernels.received_attention import received_attention
from vlmprune.triton_kernels.select_topk import select_topk

CHUNK = 1024


@triton.jit
def _spread_scores_kernel(
    scores_ptr,  # [B, N] float32, contiguous
    columns_ptr,  # [B, N] int64, contiguous
    key_mask_ptr,  # [B, S] uint8, contiguous, or None
    spread_ptr,  # [B, S] float32, contiguous
    code_ptr,  # [B, S] int8, contiguous
    N,
    S,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    for start in range(0, S, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        mask = offs < S
        code = tl.full((CHUNK,), 1, tl.int8)
        if key_mask_ptr is not None:
            visible = tl.load(key_mask_ptr + b * S + offs, mask=mask, other=0)
            code = tl.where(visible != 0, 1, 2).to(tl.int8)
        tl.store(code_ptr + b * S + offs, code, mask=mask)
        tl.store(spread_ptr + b * S + offs, tl.zeros((CHUNK,), tl.float32), mask=mask)
    tl.debug_barrier()  # the stores below may hit addresses that another thread wrote above
    for start in range(0, N, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        column = tl.load(columns_ptr + b * N + offs, mask=offs < N, other=-1)
        ok = column >= 0
        if key_mask_ptr is not None:
            ok = ok & (tl.load(key_mask_ptr + b * S + column, mask=ok, other=0) != 0)
        score = tl.load(scores_ptr + b * N + offs, mask=ok, other=0.0)
        tl.store(spread_ptr + b * S + column, score, mask=ok)
        tl.store(code_ptr + b * S + column, tl.zeros((CHUNK,), tl.int8), mask=ok)


def prune_tokens(
    query,
    key,
    tensors,
    rows,
    columns,
    keep,
    width,
    key_mask,
    causal,
    lse,
    row_weight,
    head_reduce,
    row_reduce,
    normalize,
    scale,
    rope,
):
    """Chain the launchers. Arguments were validated by vlmprune.ops.prune_tokens."""
    (B, S), N = (query.shape[0], key.shape[2]), columns.shape[1]
    scores = received_attention(
        query,
        key,
        rows,
        columns,
        key_mask,
        causal,
        lse,
        row_weight,
        head_reduce,
        row_reduce,
        normalize,
        scale,
        rope,
    )
    spread = query.new_empty((B, S), dtype=torch.float32)
    code = query.new_empty((B, S), dtype=torch.int8)
    if B * S:
        columns = columns.contiguous()
        _spread_scores_kernel[(B,)](scores, columns, as_bytes(key_mask), spread, code, N, S, CHUNK=CHUNK)
    index, count = select_topk(spread, keep, code, width)
    return gather_tokens(tensors, index), index, count, scores
