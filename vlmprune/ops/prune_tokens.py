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
    check_positions,
    check_query_key,
    check_rope,
    check_row_weight,
    check_tensors,
)
from vlmprune.ops._dispatch import Backend, always, choose, needs_triton, register
from vlmprune.ops.gather_tokens import empty_outputs, scatter_rows
from vlmprune.ops.received_attention import NORMALIZES, ROW_REDUCES

HEAD_REDUCES = ("mean", "max", "sum")


class Pruned(NamedTuple):
    """What survives.

    Attributes:
        tensors: the gathered tensors, in the order given, M positions each.
        index: ``[B, M]`` int64 sequence positions that survive, ascending, -1 on the right.
        count: ``[B]`` int64, how many positions of each sample survive.
        scores: ``[B, N]`` float32 scores of the columns.
    """

    tensors: list[Tensor]
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    count: Tensor  # type: ignore[assignment]
    scores: Tensor


def prune_tokens(
    query: Tensor,
    key: Tensor,
    tensors: Sequence[Tensor],
    *,
    rows: Tensor,
    columns: Tensor,
    keep: int,
    key_mask: Tensor | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    row_weight: Tensor | None = None,
    head_reduce: str = "mean",
    row_reduce: str = "mean",
    normalize: str = "row",
    scale: float | None = None,
    rope: Rope | None = None,
    width: int | None = None,
) -> Pruned:
    """Keep the ``keep`` best-scored columns, and every position that is neither a column nor masked. Never waits.

    Arguments not listed are those of ``received_attention``. Gradients flow through the gathered tensors only.

    Args:
        tensors: what to shorten, each as ``gather_tokens`` takes it, with S positions.
        columns: the positions that compete, ``[B, N]`` int64, distinct, -1 = padding; a masked column is dropped.
        keep: how many columns of each sample survive, at most N (samples with fewer keep them all).
        width: M, how many positions the outputs hold. None = exactly what survives of an unpadded batch of one,
            S - N + keep, and S for larger batches, whose samples may differ. Who knows the longest sample on the host
            passes its length; of a sample that is longer still the last positions are cut, and ``count`` tells.

    Returns:
        ``Pruned(tensors, index, count, scores)``.

    Raises:
        ValueError: an argument has another rank, shape, dtype, stride, device or value.
        BackendError: no backend can run on the device of ``query``.
    """
    check_query_key(query, key)
    (B, _, S, _), N = key.shape, columns.shape[-1]
    check_tensors(tensors, B, key.device, S)
    check_positions("rows", rows, query, "R")
    check_positions("columns", columns, query, "N")
    check(N <= S, "columns", f"at most the {S} positions of key", N)
    check_count("keep", keep, N)
    check_key_mask(key_mask, key)
    check_lse(lse, query, normalize, rope)
    check_row_weight(row_weight, rows)
    check_choice("head_reduce", head_reduce, HEAD_REDUCES)
    check_choice("row_reduce", row_reduce, ROW_REDUCES)
    check_choice("normalize", normalize, NORMALIZES)
    check_rope(rope, key)
    cos, sin = (None, None) if rope is None else rope
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scoring = (key_mask, causal, lse, row_weight, head_reduce, row_reduce, normalize, scale, cos, sin)
    if width is None:
        width = S - N + keep if B == 1 else S
    else:
        check_count("width", width, S)
    return Pruned(*_prune_tokens(query, key, list(tensors), rows, columns, keep, width, *scoring))


@torch.library.custom_op("vlmprune::prune_tokens", mutates_args=())
def _prune_tokens(
    query: Tensor,
    key: Tensor,
    tensors: list[Tensor],
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
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    rope = None if cos is None else (cos, sin)
    scoring = (key_mask, causal, lse, row_weight, head_reduce, row_reduce, normalize, scale, rope)
    return choose("prune_tokens", query)(query, key, tensors, rows, columns, keep, width, *scoring)


@_prune_tokens.register_fake
def _(
    query: Tensor,
    key: Tensor,
    tensors: list[Tensor],
    rows: Tensor,
    columns: Tensor,
    keep: int,
    width: int,
    *scoring: object,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    B, N = columns.shape
    scores = query.new_empty(B, N, dtype=torch.float32)
    return empty_outputs(tensors, B, width), columns.new_empty(B, width), columns.new_empty(B), scores


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(output[1])
    ctx.shapes = [tuple(x.shape) for x in inputs[2]]


def _backward(
    ctx: Any, grads: list[Tensor | None], no_index: None, no_count: None, no_scores: Tensor | None
) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    wanted = zip(grads, ctx.shapes, ctx.needs_input_grad[2], strict=True)
    back = [scatter_rows(g, index, s) if need and g is not None else None for g, s, need in wanted]
    return None, None, back, *[None] * 14


_prune_tokens.register_autograd(_backward, setup_context=_save)


def _load_triton() -> Callable[..., tuple[list[Tensor], Tensor, Tensor, Tensor]]:
    from vlmprune.triton_kernels.prune_tokens import prune_tokens as launch

    return launch


register(
    "prune_tokens",
    (
        Backend("triton", _load_triton, needs_triton),
        Backend("reference", lambda: reference.prune_tokens, always),
    ),
)
