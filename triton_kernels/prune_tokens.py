"""Score, select and gather in a row, with nothing waiting for the host.

Launches: row_lse where no log-sum-exp is given, score_select, gather_tokens; a sequence longer than one chunk of
select_topk is selected by select_topk, in a launch of its own, whose warps the score kernel need not pay for.
"""

import torch

from vlmprune.triton_kernels._launch import Program, recording
from vlmprune.triton_kernels._scoring import Scoring, Selection
from vlmprune.triton_kernels.gather_tokens import gather_tokens
from vlmprune.triton_kernels.score_select import score
from vlmprune.triton_kernels.select_topk import MAX_CHUNK, select_topk


def prune_tokens(query, key, tensors, rows, columns, keep, width, *scoring):
    """(gathered tensors, index, count, scores, cu_seqlens_out or None). Checked by vlmprune.ops.prune_tokens."""
    s = Scoring(query, key, rows, columns, *scoring)
    B, S = rows.shape[0], key.shape[2]
    seqs = s.cu_seqlens is not None
    longest = s.max_seqlen if seqs and s.max_seqlen is not None else S
    keep = keep.contiguous() if isinstance(keep, torch.Tensor) else keep
    spread = query.new_empty((B, longest), dtype=torch.float32)
    code = query.new_empty((B, longest), dtype=torch.int8)
    if longest > MAX_CHUNK and not seqs:
        scores = score(s, Selection(keep, spread, code))
        index, count = select_topk(spread, keep, code, width)
        return gather_tokens(tensors, index), index, count, scores, None
    index = query.new_empty((1 if seqs else B, width), dtype=torch.int64)
    count = query.new_empty(B, dtype=torch.int64)
    ends = s.cu_seqlens.new_empty(B + 1) if seqs else None
    if B == 0:
        scores = query.new_empty(columns.shape, dtype=torch.float32)
        index, ends = index.fill_(-1), ends if ends is None else ends.zero_()
    else:
        scores = score(s, Selection(keep, spread, code, index, count, ends))
    return gather_tokens(tensors, index), index, count, scores, ends


def prune_plan(call, inputs):
    """(Program, result): prune_tokens recorded with arguments ``call``; a run exchanges ``inputs`` and the gathered tensors."""
    with recording() as recorded:
        result = prune_tokens(*call)
    return Program(recorded, [*inputs, *result[0]]), result
