"""Received attention: the scores of score_select.py, without a selection."""

import torch

from vlmprune.triton_kernels.score_select import score


def received_attention(s):
    """Scores of the columns, ``[B, N]`` or ``[B, H, N]``. Takes the Scoring that vlmprune.ops has checked."""
    (B, R), N, H = s.rows.shape, s.columns.shape[1], s.query.shape[1]
    if B * N * R == 0:
        shape = (B, H, N) if s.head_reduce == "none" else (B, N)
        return s.query.new_zeros(shape, dtype=torch.float32)
    return score(s)
