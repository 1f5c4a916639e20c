"""Score, select and gather in a row, with nothing waiting for the host.

Launches: row_lse where no log-sum-exp is given, score_select, gather_tokens; a sequence longer than one chunk of
select_topk is selected by select_topk, in a launch of its own, whose warps the score kernel need not pay for.
"""

import torch

from vlmprune.triton_kernels._device import longest
from vlmprune.triton_kernels._launch import Program, recording
from vlmprune.triton_kernels.gather_tokens import gather_tokens
from vlmprune.triton_kernels.score_select import score
from vlmprune.triton_kernels.select_topk import MAX_CHUNK, select_topk


def prune_tokens(s, tensors, keep, width):
    """(gathered tensors, index, count, scores, cu_seqlens_out or None) of a Scoring that vlmprune.ops has checked."""
    B, S, packed = s.rows.shape[0], longest(s), s.cu_seqlens is not None
    keep = keep.contiguous() if isinstance(keep, torch.Tensor) else keep
    spread = s.query.new_empty((B, S), dtype=torch.float32)
    code = s.query.new_empty((B, S), dtype=torch.int8)
    if S > MAX_CHUNK and not packed:
        scores = score(s, keep, spread, code)
        index, count = select_topk(spread, keep, code, width)
        return gather_tokens(tensors, index), index, count, scores, None
    index = s.query.new_empty((1 if packed else B, width), dtype=torch.int64)
    count = s.query.new_empty(B, dtype=torch.int64)
    ends = s.cu_seqlens.new_empty(B + 1) if packed else None
    if B == 0:
        scores = s.query.new_empty(s.columns.shape, dtype=torch.float32)
        index, ends = index.fill_(-1), ends if ends is None else ends.zero_()
    else:
        scores = score(s, keep, spread, code, index, count, ends)
    return gather_tokens(tensors, index), index, count, scores, ends


def prune_plan(s, tensors, keep, width, inputs):
    """(Program, result): prune_tokens recorded; a run exchanges ``inputs`` and the gathered tensors."""
    with recording() as recorded:
        result = prune_tokens(s, tensors, keep, width)
    return Program(recorded, [*inputs, *result[0]]), result
