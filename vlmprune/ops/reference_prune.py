"""What prune_tokens and prune_scored compute, in plain PyTorch: the specification of their kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.ops._checks import seq_len
from vlmprune.ops.reference import gather_tokens, order_key, received_attention, unpack
from vlmprune.ops.scoring import Scoring
from vlmprune.ops.selection import Selection


def _best(scores: Tensor, competes: Tensor, ahead: Tensor, s: Selection) -> Tensor:
    """Of every segment the ``keep`` best of the columns that compete, bool ``[B, N]``; those ``ahead`` of all come first."""
    B, N = scores.shape
    lengths = torch.full((B, 1), N, device=scores.device) if s.segments is None else s.segments
    G, ends = lengths.shape[1], lengths.cumsum(1)
    segment = torch.searchsorted(ends, torch.arange(N, device=ends.device).repeat(B, 1), right=True)
    quota = torch.as_tensor(s.keep if s.quota is None else s.quota, device=scores.device)
    quota = (quota[:, None] if quota.ndim == 1 else quota).expand(B, G)
    key = torch.where(ahead, 1 << 40, order_key(scores))
    kept = torch.zeros_like(competes)
    for g in range(G):
        inside = competes & (segment == g)
        rank = (
            torch.where(inside, key, -(1 << 41)).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        )
        kept |= inside & (rank < quota[:, g, None])
    return kept


def _where(marked: Tensor, width: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Where ``marked [B, n]`` is True, ``[B, width]`` ascending, -1 on the right or left; and each one's place ``[B, n]``."""
    count = marked.sum(1, keepdim=True)
    place = marked.cumsum(1) - 1 + (width - count if left else 0)
    place = torch.where(marked & (place >= 0) & (place < width), place, -1)
    index = torch.full((len(marked), width + 1), -1, device=marked.device)
    order = torch.arange(marked.shape[1], device=marked.device).expand_as(place)
    index = index.scatter(1, torch.where(place >= 0, place, width), order)[:, :width]
    return index.contiguous(), place


def survivors(
    scores: Tensor, columns: Tensor, key_mask: Tensor | None, S: int, rows: int, s: Selection
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stays of the last ``rows`` of S positions, of which ``columns [B, N]`` compete with ``scores [B, N]``.

    Returns ``index [B, width]`` counted from the first of these rows, ``count [B]``, ``kept [B, most]`` numbers of the columns
    that stay, and where these stand in the index.
    """
    (B, N), device = columns.shape, columns.device
    visible = torch.ones(B, S, dtype=torch.bool, device=device) if key_mask is None else key_mask
    order = torch.arange(S, device=device)
    at = columns.clamp(min=0)
    real = (columns >= 0) & (visible.gather(1, at) if S else columns >= 0)
    last = torch.where(visible, order, -1).amax(1, keepdim=True) if S else columns[:, :1]
    ahead = real & (columns == last) if s.newest else torch.zeros_like(real)
    code = torch.zeros(B, N, dtype=torch.int8, device=device) if s.code is None else s.code
    code = torch.where(real, code, 2).masked_fill(ahead & (code != 1), 0)
    best = _best(scores, (code == 0) | (code == 3), ahead, s)
    stays = real & (best | (code == 1) | (code == 3))
    marked = torch.cat([visible, visible.new_zeros(B, 1)], 1)  # one position more takes what is padding
    marked = marked.scatter(1, torch.where(columns >= 0, columns, S), stays)[:, :S]
    first = S - rows
    index, place = _where(marked[:, first:], s.width, s.left)
    kept, _ = _where(stays, s.most)
    stands = columns.gather(1, kept.clamp(min=0)) - first if N else kept
    here = (kept >= 0) & (stands >= 0)  # the others are none, or in the past
    stands = place.gather(1, stands.clamp(min=0)) if rows else kept
    return index, marked[:, first:].sum(1), kept, torch.where(here, stands, -1)


def pack_index(index: Tensor, count: Tensor, cu_seqlens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Index ``[B, S]`` into samples -> ``[1, width]`` into the packed tensor, -1 on the right, and the new cu_seqlens."""
    flat = torch.where(index >= 0, index + cu_seqlens[:-1, None], -1).flatten()
    first = (flat < 0).to(torch.uint8).argsort(stable=True)[:width]
    missing = flat.new_full((width - len(first),), -1)
    ends = torch.cat([count.new_zeros(1), count.cumsum(0)]).to(cu_seqlens.dtype)
    return torch.cat([flat[first], missing])[None], ends


def prune_tokens(
    tensors: Sequence[Tensor], selection: Selection, s: Scoring
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Score the columns; keep the best and every unmasked position that is no column; gather.

    Returns (tensors, index, count, scores, kept, columns, cu_seqlens): a packed batch gives a packed index and the new
    cu_seqlens, a padded one a padded index and None.
    """
    cu_seqlens, s = s.cu_seqlens, unpack(s)
    S = s.key.shape[2]
    scores, rows = received_attention(s), S
    if cu_seqlens is None:
        rows = seq_len(tensors[0]) if tensors else S
        columns, mask = s.columns, s.key_mask
        if selection.at is not None:
            columns, mask = selection.at, selection.at_mask
            S = rows = selection.reach(tensors)
        index, count, kept, columns = survivors(scores, columns, mask, S, rows, selection)
        return gather_tokens(tensors, index), index, count, scores, kept, columns, None
    width = selection.width
    whole = selection._replace(width=S)
    index, count, kept, columns = survivors(scores, s.columns, s.key_mask, S, rows, whole)
    index, ends = pack_index(index, count, cu_seqlens, width)
    columns = torch.where(columns >= 0, columns + ends[:-1, None], -1)
    columns = columns.masked_fill(columns >= width, -1)
    return gather_tokens(tensors, index), index, count, scores, kept, columns, ends


def prune_scored(
    tensors: Sequence[Tensor],
    selection: Selection,
    scores: Tensor,
    columns: Tensor,
    key_mask: Tensor | None,
    length: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """The same of ``length`` positions for scores that are there: (tensors, index, count, kept, columns)."""
    index, count, kept, places = survivors(scores, columns, key_mask, length, length, selection)
    return gather_tokens(tensors, index), index, count, kept, places
