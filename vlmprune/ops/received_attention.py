"""Op: the attention that chosen keys receive from chosen query rows, without the S x S matrix."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from vlmprune.ops import reference
from vlmprune.ops._operator import operator
from vlmprune.ops.scoring import Scoring, ScoringKeywords


def received_attention(query: Tensor, key: Tensor, **scoring: Unpack[ScoringKeywords]) -> Tensor:
    """Score each column by the attention it receives, as FastV (arXiv:2403.06764) and many after it do.

    Rows are reduced first, within each head, then heads. A real row that cannot see a column counts as 0 in the
    mean; max looks only at the rows that see the column and gives 0 where none does. A score is NaN where a row or a
    head it is made of is NaN; what is masked or not yet visible may hold anything.

    Packed batches follow FlashAttention's variable-length calls: the samples lie end to end in ``query [1, H, total_q, D]``
    and ``key [1, Hkv, total_k, D]``, sample b at ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Rows and columns count from
    the start of their sample, and B below is the number of samples; ``lse`` is ``[1, H, total_q]`` or ``[H, total_q]``.

    Args:
        query: ``[B, H, Sq, D]`` float32, float16 or bfloat16, last dim contiguous, D at most 256; the last Sq of S positions.
        key: ``[B, Hkv, S, D]``, same dtype; Hkv divides H.
        rows: key positions ``[B, R]`` int64 in ``[S - Sq, S)``, -1 = padding. On a GPU others count as padding. Required.
        columns: key positions ``[B, N]`` int64 in ``[0, S)``, -1 = padding, which scores 0. On a GPU others do too. Required.
        key_mask: ``[B, S]`` bool, False = padding; None (default) = no padding.
        causal: True (default) = a row sees only keys up to its own position; False for a vision tower.
        lse: ``[B, H, Sq]`` float32 natural log, from the attention kernel; None (default) = computed here. Only for
            normalize "row".
        row_weight: ``[B, R]`` float; multiplies each row's attention, and the mean divides by the sum of weights; None
            (default) = ones.
        pair_weight: ``[B, R, N]`` float32; multiplies the attention of each row to each column, and is no part of what the
            mean divides by; None (default) = ones.
        head_reduce: "mean" (default), "max", "sum" or "none" (one score per head).
        top_heads: how many heads to join, at least 1: those whose scores have the largest sum over the columns, ties to the
            lower head, NaN below -inf; the mean divides by their number. Where sums differ by rounding alone (shares of the
            columns, unweighted), so does the choice between backends. Not with head_reduce "none". None (default), or as
            many as there are = all.
        row_reduce: "mean" (default), "max" or "sum".
        normalize: "row" (default) = softmax over all keys, "columns" = softmax over the columns only, "none" = raw scaled
            logits.
        scale: softmax scale; None (default) = ``D ** -0.5``.
        rope: ``(cos, sin)``, each ``[B or 1, S, D]``: score without RoPE, as FEATHER (arXiv:2412.13180); None (default) = as
            they are.
        cu_seqlens: ``[B + 1]`` int32 or int64, bounds of the samples of a packed batch; None (default) = a padded batch.
        cu_seqlens_q: bounds of the queries, if they are not those of the keys: each sample's last ones.
        max_seqlen: length of the longest sample; None (default) = not known, total_k at most.

    Returns:
        ``[B, N]`` float32, or ``[B, H, N]`` for head_reduce "none". Not differentiable.

    Raises:
        InputError: an argument has another rank, shape, dtype, stride, device or value (of tensors on the CPU: the
            entries too).
        BackendError: no backend can run on the device of ``query``.

    Example:
        The last of 6 positions looks for key 3; columns 2 to 4 are scored.

        >>> key = torch.eye(6, 8)[None, None]  # one sample, one head, 6 positions, D = 8
        >>> rows, columns = torch.tensor([[5]]), torch.tensor([[2, 3, 4]])
        >>> scores = ops.received_attention(9 * key[:, :, 3:4], key, rows=rows, columns=columns)
        >>> scores.shape, scores.argmax().item()
        (torch.Size([1, 3]), 1)
    """
    return _received_attention(*Scoring.checked(query, key, **scoring))


@operator(reference.received_attention)
def _received_attention(scoring: Scoring) -> Tensor:
    (B, N), H = scoring.columns.shape, scoring.query.shape[1]
    shape = (B, H, N) if scoring.head_reduce == "none" else (B, N)
    return scoring.query.new_empty(shape, dtype=torch.float32)
