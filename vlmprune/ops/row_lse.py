"""Op: log-sum-exp of chosen query rows over all keys, for when no attention kernel has left one behind."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.ops import reference
from vlmprune.ops._operator import operator
from vlmprune.ops.scoring import Rope, Scoring


def row_lse(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    key_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    rope: Rope | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Natural log of the softmax denominator of each listed query row.

    Args:
        query: ``[B, H, Sq, D]`` float32, float16 or bfloat16, last dim contiguous, D at most 256; the last Sq of S positions.
        key: ``[B, Hkv, S, D]``, same dtype; Hkv divides H.
        rows: key positions ``[B, R]`` int64 in ``[S - Sq, S)``, -1 = padding. On a GPU others count as padding.
        key_mask: ``[B, S]`` bool, False = padding; None = no padding.
        causal: whether a row sees only keys up to its own position.
        scale: softmax scale; None = ``D ** -0.5``.
        rope: ``(cos, sin)``, each ``[B or 1, S, D]``: undo rotate-half RoPE on query and key first.
        cu_seqlens, cu_seqlens_q, max_seqlen: of a packed batch, as in ``received_attention``; None = a padded batch.

    Returns:
        ``[B, H, R]`` float32; -inf for padding rows and for rows that see no key. Not differentiable.

    Raises:
        InputError: an argument has another rank, shape, dtype, stride or device, or on the CPU an entry out of range.
        BackendError: no backend can run on the device of ``query``.

    Example:
        >>> key = torch.zeros(1, 1, 4, 8)  # four keys, all of logit 0: the denominators are 3 and 4
        >>> ops.row_lse(key, key, torch.tensor([[2, 3]])).exp().round()
        tensor([[[3., 4.]]])
    """
    scoring = Scoring.checked(
        query,
        key,
        rows=rows,
        columns=rows,  # nobody reads them: every key counts
        key_mask=key_mask,
        causal=causal,
        scale=scale,
        rope=rope,
        cu_seqlens=cu_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen=max_seqlen,
    )
    return _row_lse(*scoring)


@operator(reference.row_lse)
def _row_lse(scoring: Scoring) -> Tensor:
    (B, R), H = scoring.rows.shape, scoring.query.shape[1]
    return scoring.query.new_empty(B, H, R, dtype=torch.float32)
