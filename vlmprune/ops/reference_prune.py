"""What prune_tokens and prune_scored compute, in plain PyTorch: the specification of their kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.ops._checks import seq_len
from vlmprune.ops.reference import best_of, gather_tokens, listed, order_key, received_attention, unpack
from vlmprune.ops.scoring import Scoring
from vlmprune.ops.selection import Selection


def _best(scores: Tensor, competes: Tensor, ahead: Tensor | None, s: Selection) -> Tensor:
    """Of every segment the ``keep`` best of the columns that compete, bool ``[B, N]``; those ``ahead`` of all come first."""
    B, N = scores.shape
    quota = torch.as_tensor(s.keep if s.quota is None else s.quota, device=scores.device)
    quota = (quota[:, None] if quota.ndim == 1 else quota).expand(B, -1 if quota.ndim else 1)
    key = order_key(scores)
    key = key if ahead is None else key.masked_fill_(ahead, (1 << 31) - 1)  # above that of inf
    order = key.argsort(dim=1, descending=True, stable=True)
    if s.segments is None:
        return best_of(order, competes, quota)
    ends, kept = s.segments.cumsum(1), torch.zeros_like(competes)
    segment = torch.searchsorted(ends, torch.arange(N, device=ends.device).repeat(B, 1), right=True)
    for g, each in enumerate(torch.split(quota.expand(B, ends.shape[1]), 1, dim=1)):
        kept |= best_of(order, competes & (segment == g), each)
    return kept


def _where(marked: Tensor, width: int, left: bool) -> tuple[Tensor, Tensor]:
    """Where ``marked [B, n]`` is True, ``[B, width]`` ascending, -1 on the right or left; and each one's place ``[B, n]``."""
    place = marked.cumsum(1) - 1
    if left:
        place += width - marked.sum(1, keepdim=True)
    inside = marked & (place < width)
    inside = inside & (place >= 0) if left else inside
    index = torch.full((len(marked), width + 1), -1, device=marked.device)
    order = torch.arange(marked.shape[1], device=marked.device).expand_as(place)
    index = index.scatter_(1, torch.where(inside, place, width), order)[:, :width]
    return index.contiguous(), torch.where(inside, place, -1)


def survivors(
    scores: Tensor, columns: Tensor, key_mask: Tensor | None, S: int, rows: int, s: Selection
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stays of the last ``rows`` of S positions, of which ``columns [B, N]`` compete with ``scores [B, N]``.

    Returns ``index [B, width]`` counted from the first of these rows, ``count [B]``, ``kept [B, most]`` numbers of the columns
    that stay, and where these stand in the index.
    """
    (B, N), device, first = columns.shape, columns.device, S - rows
    real = columns >= 0
    marked = torch.ones(B, S + 1, dtype=torch.bool, device=device)  # one position more takes what is padding
    if key_mask is not None:
        marked[:, :S] = key_mask
        real = real & marked.gather(1, columns.clamp(min=0))
    ahead = None
    if s.newest:
        last = S - 1 if key_mask is None else _last(key_mask)
        ahead = real & (columns == last)
    if s.code is None:
        stays = _best(scores, real, ahead, s)
    else:
        code = s.code if ahead is None else s.code.masked_fill(ahead & (s.code != 1), 0)
        best = _best(scores, real & ((code == 0) | (code == 3)), ahead, s)
        stays = real & (best | (code == 1) | (code == 3))
    marked = marked.scatter_(1, torch.where(columns >= 0, columns, S), stays)[:, first:S]
    index, place = _where(marked, s.width, s.left)
    kept = listed(stays, s.most)
    stands = columns.gather(1, kept.clamp(min=0)) - first if N else kept
    here = (kept >= 0) & (stands >= 0)  # the others are none, or in the past
    stands = place.gather(1, stands.clamp(min=0)) if rows else kept
    return index, marked.sum(1), kept, torch.where(here, stands, -1)


def _last(mask: Tensor) -> Tensor:
    """The last True ``[B, 1]`` of ``mask [B, S]``, -1 where there is none."""
    order = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, order, -1).amax(1, keepdim=True) if mask.shape[1] else order.new_full((1, 1), -1)


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
