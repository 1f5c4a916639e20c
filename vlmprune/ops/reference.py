"""What each op computes, in plain PyTorch. Read this first: it is the specification of every kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo rotate-half RoPE on ``x [B, H, S, D]`` with tables ``[B, S, D]``; also undoes a scaling folded into them."""
    c, s = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    half = x.shape[-1] // 2
    rotated_back = torch.cat([x[..., half:], -x[..., :half]], dim=-1).float()
    return (x.float() * c + rotated_back * s) / (c * c + s * s)


def _row_logits(query: Tensor, key: Tensor, rows: Tensor, scale: float, rope: Rope | None) -> Tensor:
    """Scaled logits ``[B, H, R, S]`` in float32 of the listed query rows (key positions) against all keys."""
    B, H, Sq, D = query.shape
    S = key.shape[2]
    if rope is not None:
        cos, sin = (t.expand(B, -1, -1) for t in rope)
        query, key = unrotate(query, cos[:, S - Sq :], sin[:, S - Sq :]), unrotate(key, cos, sin)
    at = torch.where(rows >= 0, rows - (S - Sq), 0)[:, None, :, None].expand(-1, H, -1, D)
    q = query.gather(2, at).float()
    k = key.float().repeat_interleave(H // key.shape[1], dim=1)
    return q @ k.transpose(2, 3) * scale


def _visible(rows: Tensor, S: int, key_mask: Tensor | None, causal: bool) -> Tensor:
    """Which keys each listed row may attend to: bool ``[B, 1, R, S]``; padding rows see nothing."""
    positions = torch.arange(S, device=rows.device)
    ok = (rows >= 0)[:, :, None].expand(-1, -1, S)
    if causal:
        ok = ok & (positions <= rows[:, :, None])
    if key_mask is not None:
        ok = ok & key_mask[:, None, :]
    return ok[:, None]


def row_lse(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    rope: Rope | None,
) -> Tensor:
    """Natural log-sum-exp ``[B, H, R]`` of the listed rows over all keys they see; -inf where a row sees none."""
    logits = _row_logits(query, key, rows, scale, rope)
    ok = _visible(rows, key.shape[2], key_mask, causal)
    return logits.masked_fill(~ok, float("-inf")).logsumexp(-1)


def received_attention(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    columns: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    lse: Tensor | None,
    row_weight: Tensor | None,
    head_reduce: str,
    row_reduce: str,
    normalize: str,
    scale: float,
    rope: Rope | None,
) -> Tensor:
    """Attention each column receives from the listed rows: ``[B, N]``, or ``[B, H, N]`` for head_reduce "none"."""
    (B, H, Sq, _), S, R = query.shape, key.shape[2], rows.shape[1]
    logits = _row_logits(query, key, rows, scale, rope)
    ok = _visible(rows, S, key_mask, causal)
    at = columns.clamp(min=0)[:, None, None, :].expand(B, 1, R, -1)
    ok_columns = ok.gather(3, at) & (columns >= 0)[:, None, None, :]  # [B, 1, R, N]
    picked = logits.gather(3, at.expand(-1, H, -1, -1))  # [B, H, R, N]
    if normalize == "none":
        p = picked.masked_fill(~ok_columns, 0.0)
    else:
        if normalize == "columns":
            total = picked.masked_fill(~ok_columns, float("-inf")).logsumexp(-1)
        elif lse is None:
            total = logits.masked_fill(~ok, float("-inf")).logsumexp(-1)
        else:
            listed = torch.where(rows >= 0, rows - (S - Sq), 0)
            total = lse.float().gather(2, listed[:, None, :].expand(-1, H, -1))
        p = (picked - total[..., None]).exp().masked_fill(~ok_columns, 0.0)
    return _reduce(p, ok_columns, rows, row_weight, row_reduce, head_reduce)


def _reduce(
    p: Tensor, ok: Tensor, rows: Tensor, row_weight: Tensor | None, row_reduce: str, head_reduce: str
) -> Tensor:
    """Reduce ``[B, H, R, N]`` over rows within each head, then over heads. Padding rows count in nothing.

    A real row that cannot see a column contributes 0 to it (it counts in the mean); max looks only at the
    rows that see the column and gives 0 where none does.
    """
    real = (rows >= 0).float() if row_weight is None else torch.where(rows >= 0, row_weight.float(), 0.0)
    w = real[:, None, :, None]
    if row_reduce == "max":
        per_head = (p * w).masked_fill(~ok, float("-inf")).amax(2) if p.shape[2] else p.sum(2)
        per_head = per_head.masked_fill(per_head == float("-inf"), 0.0)
    else:
        per_head = (p * w).sum(2)
        if row_reduce == "mean":
            total = w.sum(2)
            per_head = torch.where(total > 0, per_head / total, 0.0)
    if head_reduce == "none":
        return per_head
    return (
        per_head.amax(1)
        if head_reduce == "max"
        else per_head.mean(1)
        if head_reduce == "mean"
        else per_head.sum(1)
    )


def order_key(scores: Tensor) -> Tensor:
    """Map scores to int64 so that integer order is float order, -0.0 equals 0.0, and NaN ranks below -inf."""
    x = scores.float() + 0.0  # turns -0.0 into 0.0
    bits = x.view(torch.int32).to(torch.int64)
    key = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return torch.where(x.isnan(), -(1 << 31), key)


def select_topk(scores: Tensor, keep: int | Tensor, code: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Kept positions ``[B, width]`` ascending, -1 on the right, and their number ``[B]`` int64."""
    B, N = scores.shape
    code = torch.zeros(B, N, dtype=torch.int8, device=scores.device) if code is None else code
    quota = torch.as_tensor(keep, dtype=torch.int64, device=scores.device).expand(B).clamp(min=0)
    key = torch.where(code == 0, order_key(scores), -(1 << 40))
    rank = key.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = ((code == 0) & (rank < quota[:, None])) | (code == 1)
    count = kept.sum(1)
    slots = kept.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    inside = torch.arange(slots.shape[1], device=scores.device) < count[:, None]
    return torch.where(inside, slots, -1), count


def gather_tokens(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Rows ``index [B, K]`` of every tensor, along dim 1 for rank 2 and 3, dim 2 for rank 4; -1 gathers zeros."""
    out = []
    for x in tensors:
        dim = 2 if x.ndim == 4 else 1
        shape = [1] * x.ndim
        shape[0], shape[dim] = index.shape
        at = index.view(shape)
        x = x.expand(index.shape[0], *x.shape[1:])
        full = list(x.shape)
        full[dim] = index.shape[1]
        plain = x.view(torch.uint8) if x.element_size() == 1 else x  # PyTorch cannot gather float8
        rows = plain.gather(dim, at.clamp(min=0).expand(full))
        out.append(rows.masked_fill(at < 0, 0).view(x.dtype))
    return out


def prune_tokens(
    query: Tensor,
    key: Tensor,
    tensors: Sequence[Tensor],
    rows: Tensor,
    columns: Tensor,
    keep: int,
    width: int,
    key_mask: Tensor | None,
    causal: bool,
    lse: Tensor | None,
    row_weight: Tensor | None,
    head_reduce: str,
    row_reduce: str,
    normalize: str,
    scale: float,
    rope: Rope | None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Score the columns; keep the best ``keep`` of them and every unmasked position that is no column; gather."""
    B, S = key.shape[0], key.shape[2]
    reduces = (head_reduce, row_reduce, normalize, scale, rope)
    scores = received_attention(query, key, rows, columns, key_mask, causal, lse, row_weight, *reduces)
    at = torch.where(columns >= 0, columns, S)  # padding lands in one extra position, cut off below
    spread = scores.new_zeros(B, S + 1).scatter(1, at, scores)[:, :S]
    code = torch.ones(B, S + 1, dtype=torch.int8, device=key.device).scatter(1, at, 0)[:, :S]
    code = code if key_mask is None else code.masked_fill(~key_mask, 2)
    index, count = select_topk(spread, keep, code, width)
    return gather_tokens(tensors, index), index, count, scores
