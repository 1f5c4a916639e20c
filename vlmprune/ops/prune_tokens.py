"""Ops: the whole drop in one call: score the visual columns (or take scores), keep the best, gather everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops import reference_prune
from vlmprune.ops._checks import (
    check_choice,
    check_count,
    check_range,
    check_tensor,
    check_tensors,
    seq_len,
)
from vlmprune.ops._operator import operator
from vlmprune.ops.gather_tokens import empty_outputs, save_rows, scatter_grads
from vlmprune.ops.scoring import Scored, Scoring, ScoringKeywords
from vlmprune.ops.selection import Selection, SelectionKeywords

HEAD_REDUCES = ("mean", "max", "sum")


class PruneKeywords(SelectionKeywords, ScoringKeywords):
    """How to score and how to select."""

    at: Tensor | None
    at_mask: Tensor | None


class ScoredKeywords(SelectionKeywords, TypedDict, total=False):
    """Which positions the scores are of, and how to select."""

    columns: Tensor | None
    key_mask: Tensor | None
    length: int | None


class Pruned(NamedTuple):
    """What survives.

    Attributes:
        tensors: the gathered tensors, in the order given, M positions each.
        index: ``[B, M]`` int64 positions that survive, ascending, -1 where there is none, counted from the first one of the
            tensors; of a packed batch ``[1, M]`` positions in the packed tensors.
        count: ``[B]`` int64, how many positions of each sample survive.
        scores: ``[B, N]`` float32 scores of the columns.
        kept: ``[B, K]`` int64 which of the columns survive, numbers 0 ... N - 1, ascending, -1 on the right.
        columns: ``[B, K]`` int64 where those now stand in the outputs, -1 on the right (and where it was cut off).
        cu_seqlens: ``[B + 1]``, the bounds of the samples in the outputs of a packed batch; else None.

    Example:
        >>> key, lists = torch.zeros(1, 1, 4, 8), dict(rows=torch.tensor([[3]]), columns=torch.tensor([[0, 1, 2]]))
        >>> out = ops.prune_tokens(key, key, [key], keep=2, **lists)
        >>> out.index, out.kept  # equal scores: the first ones stay
        (tensor([[0, 1, 3]]), tensor([[0, 1]]))
    """

    tensors: list[Tensor]
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    count: Tensor  # type: ignore[assignment]
    scores: Tensor
    kept: Tensor
    columns: Tensor
    cu_seqlens: Tensor | None = None


def prune_tokens(
    query: Tensor, key: Tensor, tensors: Sequence[Tensor], **how: Unpack[PruneKeywords]
) -> Pruned:
    """Keep the ``keep`` best-scored columns, and every position that is neither a column nor masked. Never waits.

    Scoring takes the keywords of ``received_attention``; head_reduce is not "none". Gradients flow through the gathered
    tensors only. Where the tensors are shorter than ``key`` they are its last positions (before them stands a cached past,
    of which nothing is dropped), and what is returned counts from their first one.

    A packed batch stays packed: its samples lie end to end in the outputs too, sample b at ``cu_seqlens[b]`` to
    ``cu_seqlens[b + 1]`` of what is returned, with ``query``, ``key`` and ``tensors`` of first dim 1.

    Args:
        tensors: what to shorten, each as ``gather_tokens`` takes it, with as many positions as one another, S at most.
        columns: the positions that compete, ``[B, N]`` int64, ascending, -1 = padding on the right; a masked one is
            dropped. Required.
        keep: how many columns of each sample survive, at most N (samples with fewer keep them all), or ``[B]`` int64,
            clamped on the device. Required.
        segments: ``[B, G]`` int64 lengths of the parts into which a sample's columns are cut, in order (its images), 0 =
            padding; then ``keep`` is of each part, or ``[B, G]``. None (default) = one part, all columns.
        code: ``[B, N]`` int8: 0 = competes, 1 = stays, beyond ``keep``, 2 = goes, 3 = competes, and stays in any case, so
            that what survives is the union of the best and of these. None (default) = all compete. Not with a packed batch.
        newest: whether the last unmasked position of a sample, if it is a column, comes before all others: generation
            goes on from its row. False by default.
        width: M, how many positions the outputs hold. None (default) = exactly what survives of an unpadded batch of one
            with an int ``keep``, neither code nor segments and no past; all positions of the tensors otherwise. Who knows
            the longest sample on the host (packed: their sum) passes its length; of a sample that is longer still the last
            positions are cut (padded on the left: the first ones), and ``count`` tells.
        most: K, how many columns are listed. None (default) = ``keep`` where that is exact, else N.
        padding: the side on which shorter samples are padded: "right" (default), or "left" (not with a packed batch).
        at: ``[B, N]`` int64, where the columns stand in the tensors if ``key`` is of other positions, those of a vision tower:
            ascending, -1 = padding on the right. None (default) = the same positions. Not with a packed batch.
        at_mask: with ``at``, ``[B, positions]`` bool, False = a position of the tensors that is padding, and goes; None
            (default) = none is. ``key_mask`` is then of scoring alone.

    Returns:
        ``Pruned(tensors, index, count, scores, kept, columns, cu_seqlens)``.

    Raises:
        InputError: an argument has another rank, shape, dtype, stride, device or value (of tensors on the CPU: the
            entries too).
        BackendError: no backend can run on the device of ``query``.

    Example:
        Of 6 positions 1 to 4 compete, the last one looks for the 4th, and 3 stay.

        >>> key, hidden = torch.eye(6, 8)[None, None], torch.arange(12.0).view(1, 6, 2)
        >>> rows, columns = torch.tensor([[5]]), torch.tensor([[1, 2, 3, 4]])
        >>> out = ops.prune_tokens(key[:, :, 4:5], key, [hidden], rows=rows, columns=columns, keep=1)
        >>> out.index, out.count, out.tensors[0].shape
        (tensor([[0, 4, 5]]), tensor([3]), torch.Size([1, 3, 2]))
    """
    tensors, selection, scoring = checked(query, key, tensors, **how)
    *out, ends = _prune_tokens(tensors, *selection, *scoring)
    return Pruned._make([*out, None if scoring.cu_seqlens is None else ends])


def prune_scored(scores: Tensor, tensors: Sequence[Tensor], **how: Unpack[ScoredKeywords]) -> Pruned:
    """``prune_tokens`` for scores that are there already.

    Args:
        scores: ``[B, N]`` float32 of the columns; the higher survives, ties go to the lower column, NaN ranks below -inf.
        tensors: what to shorten, with S positions each.
        columns: ``[B, N]`` int64, the positions that compete, ascending, -1 = padding on the right; None (default) = all
            positions do.
        key_mask: ``[B, S]`` bool, False = padding, which goes; None (default) = no padding.
        length: S; None (default) = the positions of the tensors, or N if there are none.
        keep, width, most, code, segments, newest, padding: as for ``prune_tokens``; ``keep`` is required.

    Returns, raises: as ``prune_tokens``.

    Example:
        >>> best = ops.prune_scored(torch.tensor([[0.3, 0.9, 0.1, 0.9]]), [], keep=2)
        >>> best.index, best.columns
        (tensor([[1, 3]]), tensor([[0, 1]]))
    """
    tensors, selection, scored = checked_scored(scores, tensors, **how)
    out, index, count, kept, places = _prune_scored(tensors, *selection, *scored)
    return Pruned(out, index, count, scores, kept, places)


def checked(
    query: Tensor, key: Tensor, tensors: Sequence[Tensor], **how: Unpack[PruneKeywords]
) -> tuple[list[Tensor], Selection, Scoring]:
    """Check the arguments of ``prune_tokens``: (tensors, selection, scoring) with defaults filled in."""
    check_choice("head_reduce", how.get("head_reduce", "mean"), HEAD_REDUCES)
    own = (*SelectionKeywords.__annotations__, "at", "at_mask")
    select: Any = {name: how[name] for name in own if name in how}  # type: ignore[literal-required]
    score: Any = {name: x for name, x in how.items() if name not in select}
    s = Scoring.checked(query, key, **score)
    (B, N), S, packed = s.columns.shape, key.shape[2], s.cu_seqlens is not None
    check(N <= S, "columns", f"at most the {S} positions of key", N)
    if how.get("at") is not None or how.get("at_mask") is not None:
        S = rows = _elsewhere(tensors, s, how.get("at"), how.get("at_mask"))
    else:
        rows = _positions(tensors, key.shape[0], key.device, S, exact=packed)
    return list(tensors), Selection.checked(query, B, N, rows, packed, rows < S, **select), s


def checked_scored(
    scores: Tensor,
    tensors: Sequence[Tensor],
    *,
    columns: Tensor | None = None,
    key_mask: Tensor | None = None,
    length: int | None = None,
    **select: Unpack[SelectionKeywords],
) -> tuple[list[Tensor], Selection, Scored]:
    """Check the arguments of ``prune_scored``: (tensors, selection, scored) with defaults filled in."""
    check_tensor("scores", scores, [torch.float32], ("B", "N"), scores)
    B, N = scores.shape
    if length is not None:
        check_count("length", length)
    elif tensors:
        length = seq_len(tensors[0])
    else:
        length = N
    _positions(tensors, B, scores.device, length, exact=True)
    if columns is None:
        check(length == N, "columns", f"positions, as there are {length} and {N} scores", "None")
        columns = torch.arange(N, device=scores.device).expand(B, N)
    check_tensor("columns", columns, [torch.int64], (B, N), scores)
    check(length >= N, "columns", f"at most {length} positions", N)
    check_tensor("key_mask", key_mask, [torch.bool], (B, length), scores)
    selection = Selection.checked(scores, B, N, length, **select)
    return list(tensors), selection, Scored(scores, columns, key_mask, length)


def _positions(tensors: Sequence[Tensor], B: int, device: torch.device, S: int, exact: bool) -> int:
    """How many positions all the tensors have: S, or fewer unless that must be exact."""
    check(isinstance(tensors, list | tuple), "tensors", "a list or tuple of tensors", type(tensors).__name__)
    first = tensors[0] if tensors else None
    shorter = not exact and isinstance(first, Tensor) and first.ndim in (2, 3, 4)
    rows = min(seq_len(first), S) if shorter else S  # type: ignore[arg-type]
    check_tensors(tensors, B, device, rows)
    return rows


def _elsewhere(tensors: Sequence[Tensor], s: Scoring, at: Tensor | None, at_mask: Tensor | None) -> int:
    """How many positions the tensors have, where the columns stand ``at`` others than those of key."""
    B, device = s.columns.shape[0], s.columns.device
    check(at is not None, "at", "positions with at_mask", "None")
    check(s.cu_seqlens is None, "at", "None with cu_seqlens", "a tensor")
    check_tensor("at", at, [torch.int64], s.columns.shape, s.columns)
    check_tensor("at_mask", at_mask, [torch.bool], (B, "positions"), s.columns)
    check(bool(tensors) or at_mask is not None, "tensors", "one at least, or at_mask", "none")
    rows = seq_len(tensors[0]) if at_mask is None else at_mask.shape[1]
    _positions(tensors, B, device, rows, exact=True)
    N = s.columns.shape[1]
    check(rows >= N, "at", f"at most {rows} positions", N)
    return rows


def _call(
    run: Callable[..., Any], tensors: list[Tensor], selection: Selection, scoring: Scoring
) -> tuple[Any, ...]:
    selection.check_values(scoring.columns)
    if selection.at is not None and selection.at.device.type == "cpu":
        check_range("at", selection.at, torch.zeros(1, 1), torch.full((1, 1), selection.reach(tensors)))
    *out, ends = run(tensors, selection, scoring)
    return (*out, scoring.rows.new_empty(0) if ends is None else ends)  # an op cannot return None


@operator(reference_prune.prune_tokens, _call)
def _prune_tokens(
    tensors: list[Tensor], selection: Selection, scoring: Scoring
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns, cu_seqlens = scoring.columns, scoring.cu_seqlens
    n_index = columns.shape[0] if cu_seqlens is None else 1
    out, index, count, kept, places = _unfilled(tensors, selection, columns, n_index)
    scores = columns.new_empty(columns.shape, dtype=torch.float32)
    ends = columns.new_empty(0) if cu_seqlens is None else torch.empty_like(cu_seqlens)
    return out, index, count, scores, kept, places, ends


def _call_scored(
    run: Callable[..., Any],
    tensors: list[Tensor],
    selection: Selection,
    scores: Tensor,
    columns: Tensor,
    *rest: Any,
) -> tuple[Any, ...]:
    selection.check_values(columns)
    out: tuple[Any, ...] = run(tensors, selection, scores, columns, *rest)
    return out


@operator(reference_prune.prune_scored, _call_scored, kernels="prune_tokens")
def _prune_scored(
    tensors: list[Tensor],
    selection: Selection,
    scores: Tensor,
    columns: Tensor,
    key_mask: Tensor | None,
    length: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    return _unfilled(tensors, selection, columns, columns.shape[0])


def _unfilled(
    tensors: list[Tensor], selection: Selection, columns: Tensor, n_index: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Outputs: the gathered tensors, index, count, kept, columns."""
    B, width, most = columns.shape[0], selection.width, selection.most
    lists = ((n_index, width), (B,), (B, most), (B, most))
    index, count, kept, places = (columns.new_empty(shape) for shape in lists)
    return empty_outputs(tensors, n_index, width), index, count, kept, places


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.mark_non_differentiable(output[3])
    save_rows(ctx, inputs[0], output[1])


_prune_tokens.register_autograd(scatter_grads, setup_context=_save)
_prune_scored.register_autograd(
    scatter_grads, setup_context=lambda ctx, inputs, output: save_rows(ctx, inputs[0], output[1])
)
