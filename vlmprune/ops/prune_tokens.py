"""Op: the whole drop in one call: score the visual columns, keep the best, gather everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops import reference
from vlmprune.ops._checks import check_choice, check_count, check_tensor, check_tensors
from vlmprune.ops._operator import operator
from vlmprune.ops.gather_tokens import empty_outputs, save_rows, scatter_grads
from vlmprune.ops.scoring import Scoring, ScoringKeywords

HEAD_REDUCES = ("mean", "max", "sum")


class Pruned(NamedTuple):
    """What survives.

    Attributes:
        tensors: the gathered tensors, in the order given, M positions each.
        index: ``[B, M]`` int64 sequence positions that survive, ascending, -1 on the right; of a packed batch ``[1, M]``
            positions in the packed tensors.
        count: ``[B]`` int64, how many positions of each sample survive.
        scores: ``[B, N]`` float32 scores of the columns.
        cu_seqlens: ``[B + 1]``, the bounds of the samples in the outputs of a packed batch; else None.

    Example:
        >>> key, lists = torch.zeros(1, 1, 4, 8), dict(rows=torch.tensor([[3]]), columns=torch.tensor([[0, 1, 2]]))
        >>> ops.prune_tokens(key, key, [key], keep=2, **lists).index  # equal scores: the first ones stay
        tensor([[0, 1, 3]])
    """

    tensors: list[Tensor]
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    count: Tensor  # type: ignore[assignment]
    scores: Tensor
    cu_seqlens: Tensor | None = None


def prune_tokens(
    query: Tensor,
    key: Tensor,
    tensors: Sequence[Tensor],
    *,
    keep: int | Tensor,
    width: int | None = None,
    **scoring: Unpack[ScoringKeywords],
) -> Pruned:
    """Keep the ``keep`` best-scored columns, and every position that is neither a column nor masked. Never waits.

    ``scoring`` takes the keywords of ``received_attention``; head_reduce is not "none". Gradients flow through the gathered tensors only.

    A packed batch stays packed: its samples lie end to end in the outputs too, sample b at ``cu_seqlens[b]`` to
    ``cu_seqlens[b + 1]`` of what is returned, with ``query``, ``key`` and ``tensors`` of first dim 1.

    Args:
        tensors: what to shorten, each as ``gather_tokens`` takes it, with S positions.
        keep: how many columns of each sample survive, at most N (samples with fewer keep them all), or ``[B]`` int64,
            clamped on the device.
        width: M, how many positions the outputs hold. None = exactly what survives of an unpadded batch of one,
            S - N + keep, and S for larger batches, whose samples may differ, for packed ones and for a tensor ``keep``.
            Who knows the longest sample on the host (packed: their sum) passes its length; of a sample that is longer
            still the last positions are cut, and ``count`` tells.
        scoring: of these, ``rows`` and ``columns`` are required. Columns are the positions that compete, ``[B, N]`` int64,
            distinct, -1 = padding on the right; a masked one is dropped.

    Returns:
        ``Pruned(tensors, index, count, scores, cu_seqlens)``.

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
    s, tensors, keep, width = checked(query, key, tensors, keep=keep, width=width, **scoring)
    count, quota = (0, keep) if isinstance(keep, Tensor) else (keep, None)
    gathered, index, counts, scores, ends = _prune_tokens(tensors, count, quota, width, *s)
    return Pruned(gathered, index, counts, scores, None if s.cu_seqlens is None else ends)


def checked(
    query: Tensor,
    key: Tensor,
    tensors: Sequence[Tensor],
    *,
    keep: int | Tensor,
    width: int | None = None,
    **scoring: Unpack[ScoringKeywords],
) -> tuple[Scoring, list[Tensor], int | Tensor, int]:
    """Check the arguments of ``prune_tokens``: (scoring, tensors, keep, width) with defaults filled in."""
    check_choice("head_reduce", scoring.get("head_reduce", "mean"), HEAD_REDUCES)
    s = Scoring.checked(query, key, **scoring)
    (B, N), S = s.columns.shape, key.shape[2]
    check_tensors(tensors, key.shape[0], key.device, S)
    check(N <= S, "columns", f"at most the {S} positions of key", N)
    if isinstance(keep, Tensor):
        check_tensor("keep", keep, [torch.int64], (B,), key)
    else:
        check_count("keep", keep, N)
    if width is not None:
        check_count("width", width, S)
    elif isinstance(keep, Tensor) or B != 1 or s.cu_seqlens is not None:
        width = S
    else:
        width = S - N + keep
    return s, list(tensors), keep, width


def _call(
    run: Callable[..., Any],
    tensors: list[Tensor],
    keep: int,
    quota: Tensor | None,
    width: int,
    scoring: Scoring,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    *out, ends = run(scoring, tensors, keep if quota is None else quota, width)
    return (*out, scoring.rows.new_empty(0) if ends is None else ends)  # an op cannot return None


@operator(reference.prune_tokens, _call)
def _prune_tokens(
    tensors: list[Tensor], keep: int, quota: Tensor | None, width: int, scoring: Scoring
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    columns, cu_seqlens = scoring.columns, scoring.cu_seqlens
    B = columns.shape[0]
    n_index = B if cu_seqlens is None else 1
    return (
        empty_outputs(tensors, n_index, width),
        columns.new_empty(n_index, width),
        columns.new_empty(B),
        columns.new_empty(columns.shape, dtype=torch.float32),
        columns.new_empty(0) if cu_seqlens is None else torch.empty_like(cu_seqlens),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.mark_non_differentiable(output[3])
    save_rows(ctx, inputs[0], output[1])


_prune_tokens.register_autograd(scatter_grads, setup_context=_save)
