"""Op: the whole drop in one call: score the visual columns, keep the best, gather everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops import reference
from vlmprune.ops._checks import (
    Rope,
    check_choice,
    check_count,
    check_key_mask,
    check_lse,
    check_packed,
    check_positions,
    check_query_key,
    check_quota,
    check_rope,
    check_row_weight,
    check_tensors,
    check_values,
)
from vlmprune.ops._dispatch import Backend, always, choose, needs_triton, register
from vlmprune.ops.gather_tokens import empty_outputs, scatter_rows
from vlmprune.ops.received_attention import NORMALIZES, ROW_REDUCES, check_top_heads, with_batch_dim

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
    rows: Tensor,
    columns: Tensor,
    keep: int | Tensor,
    key_mask: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    row_weight: Tensor | None = None,
    head_reduce: str = "mean",
    row_reduce: str = "mean",
    normalize: str = "row",
    scale: float | None = None,
    rope: Rope | None = None,
    top_heads: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen: int | None = None,
    width: int | None = None,
) -> Pruned:
    """Keep the ``keep`` best-scored columns, and every position that is neither a column nor masked. Never waits.

    Arguments not listed are those of ``received_attention``. Gradients flow through the gathered tensors only.

    A packed batch stays packed: its samples lie end to end in the outputs too, sample b at ``cu_seqlens[b]`` to
    ``cu_seqlens[b + 1]`` of what is returned, with ``query``, ``key`` and ``tensors`` of first dim 1.

    Args:
        tensors: what to shorten, each as ``gather_tokens`` takes it, with S positions.
        columns: the positions that compete, ``[B, N]`` int64, distinct, -1 = padding on the right; a masked one is dropped.
        keep: how many columns of each sample survive, at most N (samples with fewer keep them all), or ``[B]`` int64,
            clamped on the device.
        width: M, how many positions the outputs hold. None = exactly what survives of an unpadded batch of one,
            S - N + keep, and S for larger batches, whose samples may differ, for packed ones and for a tensor ``keep``.
            Who knows the longest sample on the host (packed: their sum) passes its length; of a sample that is longer
            still the last positions are cut, and ``count`` tells.

    Returns:
        ``Pruned(tensors, index, count, scores, cu_seqlens)``.

    Raises:
        ValueError: an argument has another rank, shape, dtype, stride, device or value (of tensors on the CPU: the
            entries too).
        BackendError: no backend can run on the device of ``query``.
    """
    call = checked(
        query,
        key,
        tensors,
        rows=rows,
        columns=columns,
        keep=keep,
        key_mask=key_mask,
        causal=causal,
        lse=lse,
        row_weight=row_weight,
        head_reduce=head_reduce,
        row_reduce=row_reduce,
        normalize=normalize,
        scale=scale,
        rope=rope,
        top_heads=top_heads,
        cu_seqlens=cu_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen=max_seqlen,
        width=width,
    )
    count, quota = (0, keep) if isinstance(keep, Tensor) else (keep, None)
    cos, sin = (None, None) if rope is None else rope
    gathered, index, counts, scores, ends = _prune_tokens(
        *call[:5], count, quota, *call[6:15], cos, sin, *call[16:]
    )
    return Pruned(gathered, index, counts, scores, None if cu_seqlens is None else ends)


def checked(
    query: Tensor,
    key: Tensor,
    tensors: Sequence[Tensor],
    *,
    rows: Tensor,
    columns: Tensor,
    keep: int | Tensor,
    key_mask: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    row_weight: Tensor | None = None,
    head_reduce: str = "mean",
    row_reduce: str = "mean",
    normalize: str = "row",
    scale: float | None = None,
    rope: Rope | None = None,
    top_heads: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen: int | None = None,
    width: int | None = None,
) -> tuple[Any, ...]:
    """Check the arguments of ``prune_tokens`` and return them, defaults filled in, in the order of the reference."""
    check_query_key(query, key)
    B, S, N = (
        check_packed(query, key, key_mask, cu_seqlens, cu_seqlens_q, max_seqlen),
        key.shape[2],
        columns.shape[-1],
    )
    check_tensors(tensors, key.shape[0], key.device, S)
    check_positions("rows", rows, B, query, "R")
    check_positions("columns", columns, B, query, "N")
    check(N <= S, "columns", f"at most the {S} positions of key", N)
    check_quota(keep, B, N, key.device)
    check_key_mask(key_mask, key)
    lse = with_batch_dim(lse, cu_seqlens)
    check_lse(lse, query, normalize, rope)
    check_row_weight(row_weight, rows)
    check_choice("head_reduce", head_reduce, HEAD_REDUCES)
    check_choice("row_reduce", row_reduce, ROW_REDUCES)
    check_choice("normalize", normalize, NORMALIZES)
    check_rope(rope, key)
    check_top_heads(top_heads, head_reduce, query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if width is not None:
        check_count("width", width, S)
    elif isinstance(keep, Tensor) or B != 1 or cu_seqlens is not None:
        width = S
    else:
        width = S - N + keep
    reduces = (head_reduce, row_reduce, normalize, scale, rope, top_heads)
    scoring = (key_mask, causal, lse, row_weight, *reduces, cu_seqlens, cu_seqlens_q, max_seqlen)
    return query, key, list(tensors), rows, columns, keep, width, *scoring


@torch.library.custom_op("vlmprune::prune_tokens", mutates_args=())
def _prune_tokens(
    query: Tensor,
    key: Tensor,
    tensors: list[Tensor],
    rows: Tensor,
    columns: Tensor,
    keep: int,
    quota: Tensor | None,
    width: int,
    key_mask: Tensor | None,
    causal: bool,
    lse: Tensor | None,
    row_weight: Tensor | None,
    head_reduce: str,
    row_reduce: str,
    normalize: str,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    top_heads: int | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen: int | None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    seqs = (cu_seqlens, cu_seqlens_q, max_seqlen)
    check_values(query, key, rows, columns, *seqs)
    rope = None if cos is None else (cos, sin)
    scoring = (key_mask, causal, lse, row_weight, head_reduce, row_reduce, normalize, scale, rope, top_heads)
    run = choose("prune_tokens", query)
    out = run(query, key, tensors, rows, columns, keep if quota is None else quota, width, *scoring, *seqs)
    return (*out[:4], rows.new_empty(0) if out[4] is None else out[4])  # an op cannot return None


@_prune_tokens.register_fake
def _(
    query: Tensor,
    key: Tensor,
    tensors: list[Tensor],
    rows: Tensor,
    columns: Tensor,
    keep: int,
    quota: Tensor | None,
    width: int,
    *scoring: Any,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    (B, N), cu_seqlens = columns.shape, scoring[-3]
    scores = query.new_empty(B, N, dtype=torch.float32)
    n_index = B if cu_seqlens is None else 1
    ends = rows.new_empty(0) if cu_seqlens is None else torch.empty_like(cu_seqlens)
    return (
        empty_outputs(tensors, n_index, width),
        columns.new_empty(n_index, width),
        columns.new_empty(B),
        scores,
        ends,
    )


def _save(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]
) -> None:
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(output[1])
    ctx.shapes = [tuple(x.shape) for x in inputs[2]]


def _backward(ctx: Any, grads: list[Tensor | None], *no_grads: Tensor | None) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    wanted = zip(grads, ctx.shapes, ctx.needs_input_grad[2], strict=True)
    back = [scatter_rows(g, index, s) if need and g is not None else None for g, s, need in wanted]
    return None, None, back, *[None] * 19


_prune_tokens.register_autograd(_backward, setup_context=_save)


def _load_triton() -> Callable[..., tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor | None]]:
    from vlmprune.triton_kernels.prune_tokens import prune_tokens as launch

    return launch


register(
    "prune_tokens",
    (
        Backend("triton", _load_triton, needs_triton),
        Backend("reference", lambda: reference.prune_tokens, always),
    ),
)
