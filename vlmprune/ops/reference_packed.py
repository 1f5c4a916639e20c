"""What a packed batch means: the padded batch it stands for, and the way back. Part of the specification."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Padded(NamedTuple):
    """The padded batch of a packed one: positions of a sample start at 0, queries stand at their key positions."""

    query: Tensor  # [B, H, S, D], zeros where a sample has no query
    key: Tensor  # [B, Hkv, S, D]
    key_mask: Tensor  # [B, S]
    lse: Tensor | None  # [B, H, S]
    rope: tuple[Tensor, Tensor] | None  # [B, S, D] each


def unpack(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen: int | None,
) -> Padded:
    """Give each sample of a packed batch a row of its own, as long as the longest sample."""
    lengths = cu_seqlens.diff().long()
    S = max_seqlen if max_seqlen is not None else int(lengths.max()) if len(lengths) else 0
    starts_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    position = torch.arange(S, device=key.device)
    at = torch.where(position < lengths[:, None], position + cu_seqlens[:-1, None], -1)
    from_first = position - (lengths - starts_q.diff().long())[:, None]
    at_q = torch.where((from_first >= 0) & (at >= 0), from_first + starts_q[:-1, None], -1)
    lse = None if lse is None else _rows(lse[..., None], at_q)[..., 0]
    tables = None if rope is None else (_rows(rope[0], at), _rows(rope[1], at))
    return Padded(_rows(query, at_q), _rows(key, at), at >= 0, lse, tables)


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """``x [1, ..., total, D]`` at packed positions ``at [B, S]``: ``[B, ..., S, D]``, zeros where -1."""
    rows = x[0][..., at.clamp(min=0).long(), :].movedim(-3, 0)
    return rows.masked_fill((at < 0).view(len(at), *[1] * (x.ndim - 3), at.shape[1], 1), 0)


def pack_index(index: Tensor, count: Tensor, cu_seqlens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Index ``[B, S]`` into samples -> ``[1, width]`` into the packed tensor, -1 on the right, and the new cu_seqlens."""
    flat = torch.where(index >= 0, index + cu_seqlens[:-1, None], -1).flatten()
    first = (flat < 0).to(torch.uint8).argsort(stable=True)[:width]
    missing = flat.new_full((width - len(first),), -1)
    ends = torch.cat([count.new_zeros(1), count.cumsum(0)]).to(cu_seqlens.dtype)
    return torch.cat([flat[first], missing])[None], ends
