"""What each op computes, in plain PyTorch. Read this first: it is the specification of every kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmprune.ops.scoring import Scoring


def unpack(s: Scoring) -> Scoring:
    """Give each sample of a packed batch a row of its own, as long as the longest; a padded batch stays what it is.

    Positions of a sample start at 0, its queries stand at their key positions.
    """
    if s.cu_seqlens is None:
        return s
    lengths = s.cu_seqlens.diff().long()
    S = s.max_seqlen if s.max_seqlen is not None else int(lengths.max()) if len(lengths) else 0
    starts_q = s.cu_seqlens if s.cu_seqlens_q is None else s.cu_seqlens_q
    position = torch.arange(S, device=s.key.device)
    at = torch.where(position < lengths[:, None], position + s.cu_seqlens[:-1, None], -1)
    from_first = position - (lengths - starts_q.diff().long())[:, None]
    at_q = torch.where((from_first >= 0) & (at >= 0), from_first + starts_q[:-1, None], -1)
    return s._replace(
        query=_rows(s.query, at_q),
        key=_rows(s.key, at),
        key_mask=at >= 0,
        lse=None if s.lse is None else _rows(s.lse.view(1, *s.lse.shape[-2:], 1), at_q)[..., 0],
        cos=None if s.cos is None else _rows(s.cos, at),
        sin=None if s.sin is None else _rows(s.sin, at),
        cu_seqlens=None,
        cu_seqlens_q=None,
        max_seqlen=None,
    )


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """``x [1, ..., total, D]`` at packed positions ``at [B, S]``: ``[B, ..., S, D]``, zeros where -1."""
    rows = x[0][..., at.clamp(min=0).long(), :].movedim(-3, 0)
    return rows.masked_fill((at < 0).view(len(at), *[1] * (x.ndim - 3), at.shape[1], 1), 0)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo rotate-half RoPE on ``x [B, H, S, D]`` with tables ``[B, S, D]``; also undoes a scaling folded into them."""
    c, s = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    half = x.shape[-1] // 2
    rotated_back = torch.cat([x[..., half:], -x[..., :half]], dim=-1).float()
    return (x.float() * c + rotated_back * s) / (c * c + s * s)


def _row_logits(s: Scoring) -> Tensor:
    """Scaled logits ``[B, H, R, S]`` in float32 of the listed query rows (key positions) against all keys."""
    (B, H, Sq, D), S, query, key = s.query.shape, s.key.shape[2], s.query, s.key
    if s.cos is not None and s.sin is not None:
        cos, sin = (t.expand(B, -1, -1) for t in (s.cos, s.sin))
        query, key = unrotate(query, cos[:, S - Sq :], sin[:, S - Sq :]), unrotate(key, cos, sin)
    at = torch.where(s.rows >= 0, s.rows - (S - Sq), 0)
    if B == 1:  # the same, which lets PyTorch copy whole rows
        q = query.index_select(2, at[0]).float()
    else:
        q = query.gather(2, at[:, None, :, None].expand(-1, H, -1, D)).float()
    k, shared = key.float(), H // key.shape[1]
    k = k if shared == 1 else k.repeat_interleave(shared, dim=1)
    return (q @ k.transpose(2, 3)).mul_(s.scale)


def _visible(s: Scoring) -> Tensor:
    """Which keys each listed row may attend to: bool ``[B, 1, R, S]``; padding rows see nothing."""
    S = s.key.shape[2]
    positions = torch.arange(S, device=s.rows.device)
    ok = (s.rows >= 0)[:, :, None].expand(-1, -1, S)
    if s.causal:
        ok = ok & (positions <= s.rows[:, :, None])
    if s.key_mask is not None:
        ok = ok & s.key_mask[:, None, :]
    return ok[:, None]


def row_lse(s: Scoring) -> Tensor:
    """Natural log-sum-exp ``[B, H, R]`` of the listed rows over all keys they see; -inf where a row sees none."""
    s = unpack(s)
    return _row_logits(s).masked_fill_(~_visible(s), float("-inf")).logsumexp(-1)


def received_attention(s: Scoring) -> Tensor:
    """Attention each column receives from the listed rows: ``[B, N]``, or ``[B, H, N]`` for head_reduce "none"."""
    s = unpack(s)
    (B, H, Sq, _), S, R = s.query.shape, s.key.shape[2], s.rows.shape[1]
    logits, ok = (
        _row_logits(s),
        _visible(s),
    )  # logits and p are ours to write to: a pass in place costs a CPU half
    at = s.columns.clamp(min=0)[:, None, None, :].expand(B, 1, R, -1)
    ok_columns = ok.gather(3, at) & (s.columns >= 0)[:, None, None, :]  # [B, 1, R, N]
    picked = logits.gather(3, at.expand(-1, H, -1, -1))  # [B, H, R, N]
    if s.normalize == "none":
        p = picked
    else:
        if s.normalize == "columns":
            total = picked.masked_fill(~ok_columns, float("-inf")).logsumexp(-1)
        elif s.lse is None:
            total = logits.masked_fill_(~ok, float("-inf")).logsumexp(-1)
        else:
            listed = torch.where(s.rows >= 0, s.rows - (S - Sq), 0)
            total = s.lse.float().gather(2, listed[:, None, :].expand(-1, H, -1))
        p = picked.sub_(total[..., None]).exp_()
    if s.pair_weight is not None:
        p = p.mul_(s.pair_weight[:, None])
    per_head = _reduce_rows(p.masked_fill_(~ok_columns, 0.0), ok_columns, s)
    return per_head if s.head_reduce == "none" else join_heads(per_head, s.head_reduce, s.top_heads)


def join_heads(per_head: Tensor, head_reduce: str, top_heads: int | None) -> Tensor:
    """``[B, H, N]`` to ``[B, N]``: all heads, or those with the largest totals over the columns."""
    if top_heads is not None:
        order = order_key(per_head.sum(2)).argsort(dim=1, descending=True, stable=True)[:, :top_heads]
        per_head = per_head.gather(1, order[..., None].expand(-1, -1, per_head.shape[2]))
    return _HEAD_REDUCES[head_reduce](per_head)


_HEAD_REDUCES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "sum": lambda x: x.sum(1),
}


def _reduce_rows(p: Tensor, ok: Tensor, s: Scoring) -> Tensor:
    """Reduce ``p [B, H, R, N]``, which is written to, over rows within each head. Padding rows count in nothing.

    A real row that cannot see a column contributes 0 to it (it counts in the mean); max looks only at the
    rows that see the column and gives 0 where none does.
    """
    real = (s.rows >= 0).float()
    w = (real if s.row_weight is None else torch.where(real > 0, s.row_weight.float(), 0.0))[:, None, :, None]
    if s.row_reduce == "max":
        per_head = p.mul_(w).masked_fill_(~ok, float("-inf")).amax(2) if p.shape[2] else p.sum(2)
        per_head = per_head.masked_fill(~ok.any(2), 0.0)
    else:
        per_head = p.mul_(w).sum(2)
        if s.row_reduce == "mean":
            total = w.sum(2)
            per_head = torch.where(total > 0, per_head / total, 0.0)
    return per_head


def order_key(scores: Tensor) -> Tensor:
    """Map scores to int32 so that integer order is float order, -0.0 equals 0.0, and NaN ranks below -inf."""
    x = scores.float() + 0.0  # turns -0.0 into 0.0
    bits = x.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(x.isnan(), -(1 << 31))


def best_of(order: Tensor, competes: Tensor, quota: Tensor) -> Tensor:
    """Marks ``[B, N]`` of the first ``quota [B, 1]`` of those that compete, in the order that ``order [B, N]`` lists all in."""
    mine = competes.gather(1, order)
    return torch.zeros_like(mine).scatter_(1, order, mine & (mine.cumsum(1) <= quota))


def listed(marked: Tensor, width: int) -> Tensor:
    """Where ``marked [B, n]`` is True, ``[B, width]`` ascending, -1 on the right."""
    B, n = marked.shape
    place = torch.where(marked, marked.cumsum(1), 0)  # counted from 1 on: place 0 takes the others
    if width < n:
        place.masked_fill_(place > width, 0)
    index = torch.full((B, width + 1), -1, dtype=torch.int64, device=marked.device)
    return index.scatter_(1, place, torch.arange(n, device=marked.device).expand(B, n))[:, 1:].contiguous()


def select_topk(
    scores: Tensor,
    keep: int | Tensor,
    code: Tensor | None,
    width: int,
    threshold: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Kept positions ``[B, width]`` ascending, -1 on the right, and their number ``[B]`` int64."""
    B, device = len(scores), scores.device
    competes = torch.ones(scores.shape, dtype=torch.bool, device=device) if code is None else code == 0
    if threshold is not None:
        least = torch.as_tensor(threshold, dtype=torch.float32, device=device).expand(B)
        competes = competes & (scores.float() >= least[:, None])
    order = order_key(scores).argsort(dim=1, descending=True, stable=True)
    quota = torch.as_tensor(keep, dtype=torch.int64, device=device).expand(B)
    kept = best_of(order, competes, quota[:, None])
    kept = kept if code is None else kept | (code == 1)
    return listed(kept, width), kept.sum(1)


def select_segments(scores: Tensor, segments: Sequence[int], quotas: Sequence[int]) -> Tensor:
    """Positions ``[B, sum of quotas]``, ascending, of the ``quotas[i]`` best scores of each segment i."""
    parts, start = [scores.new_empty((scores.shape[0], 0), dtype=torch.int64)], 0
    for part, quota in zip(torch.split(scores, list(segments), dim=1), quotas, strict=True):
        parts.append(select_topk(part, quota, None, quota)[0] + start)
        start += part.shape[1]
    return torch.cat(parts, dim=1)


def gather_tokens(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Rows ``index [B, K]`` of every tensor, along dim 1 for rank 2 and 3, dim 2 for rank 4; zeros for what is no row."""
    out, places = [], dict[int, tuple[Tensor, Tensor | None]]()
    for x in tensors:
        dim = 2 if x.ndim == 4 else 1
        S = x.shape[dim]
        if S not in places:
            places[S] = index.clamp(0, max(S - 1, 0)), _no_rows(index, S)
        at, none = places[S]
        bits = _as_integers(x.expand(index.shape[0], *x.shape[1:]))
        if S and len(
            index
        ):  # whole rows are copied, which an index of the tensor's shape would not let PyTorch know
            parts = [bits[b : b + 1].index_select(dim, at[b]) for b in range(len(index))]
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            rows = bits.new_zeros([*bits.shape[:dim], index.shape[1], *bits.shape[dim + 1 :]])
        if none is not None:
            rows = rows.masked_fill(none.view(len(none), *[1] * (dim - 1), -1, *[1] * (x.ndim - dim - 1)), 0)
        out.append(rows.view(x.dtype))
    return out


def _no_rows(index: Tensor, S: int) -> Tensor | None:
    """Where ``index [B, K]`` names none of S rows; None if it is known without waiting for a device that it always does."""
    none = (index < 0) | (index >= S)
    return None if none.device.type == "cpu" and not none.any() else none


def compact_kv(caches: Sequence[Tensor], index: Tensor) -> None:
    """Row k of every cache becomes its row ``index[b, k]``, in place; where that is no row, it stays as it is."""
    for x, rows in zip(caches, gather_tokens(caches, index), strict=True):
        dim = x.ndim - 2
        is_row = (index >= 0) & (index < x.shape[dim])
        front = _as_integers(x).narrow(dim, 0, index.shape[1])
        mask = is_row[:, None, :, None] if x.ndim == 4 else is_row[:, :, None]
        front.copy_(torch.where(mask, _as_integers(rows), front))


def _as_integers(x: Tensor) -> Tensor:
    """The same bits: PyTorch can neither gather nor compare float8, and may change a NaN that it moves into another."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
