"""What a packed batch means: the padded batch it stands for, and the way back. Part of the specification."""

from __future__ import annotations

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


def pack_index(index: Tensor, count: Tensor, cu_seqlens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Index ``[B, S]`` into samples -> ``[1, width]`` into the packed tensor, -1 on the right, and the new cu_seqlens."""
    flat = torch.where(index >= 0, index + cu_seqlens[:-1, None], -1).flatten()
    first = (flat < 0).to(torch.uint8).argsort(stable=True)[:width]
    missing = flat.new_full((width - len(first),), -1)
    ends = torch.cat([count.new_zeros(1), count.cumsum(0)]).to(cu_seqlens.dtype)
    return torch.cat([flat[first], missing])[None], ends
