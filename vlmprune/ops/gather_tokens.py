"""Op: the same rows of many tensors (hidden states, keys and values, positions, cos and sin, masks) in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops import reference
from vlmprune.ops._checks import check_dtype, check_reach, check_tensors
from vlmprune.ops._operator import operator


def gather_tokens(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Rows ``index`` of every tensor, in that order. Differentiable in the tensors.

    Args:
        tensors: each ``[B, S]`` (any strides), ``[B, S, D]`` or ``[B, H, S, D]`` (last dim contiguous), of any dtype up to
            8 bytes; a first dim of 1 serves the whole batch. S may differ between tensors.
        index: sequence positions ``[B, K]`` int64, each in ``[0, S)``; -1 gathers zeros. On a GPU nothing checks the
            range, as that would wait for the device: a position outside it gathers zeros, too.

    Returns:
        New contiguous tensors ``[B, K]``, ``[B, K, D]`` or ``[B, H, K, D]``, in the order given.

    Raises:
        InputError: an argument has another rank, shape, dtype, stride or device, or a position on the CPU is no row.
        BackendError: no backend can run on the device of ``index``.

    Example:
        >>> hidden, positions = torch.randn(1, 4, 2), torch.arange(4)[None]
        >>> rows, kept = ops.gather_tokens([hidden, positions], torch.tensor([[0, 3]]))
        >>> rows.shape, kept
        (torch.Size([1, 2, 2]), tensor([[0, 3]]))
    """
    check_dtype("index", index, torch.int64)
    check(index.ndim == 2, "index", "rank 2 [B, K]", tuple(index.shape))
    check_tensors(tensors, index.shape[0], index.device)
    return _gather_tokens(list(tensors), index) if tensors else []


def _call(run: Callable[..., Any], tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    check_reach(index, tensors)
    return run(tensors, index)


@operator(reference.gather_tokens, _call, cuda=True)
def _gather_tokens(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    return empty_outputs(tensors, *index.shape)


def empty_outputs(tensors: Sequence[Tensor], B: int, K: int) -> list[Tensor]:
    """What a gather of K rows returns, not filled."""
    shapes = [(B, *x.shape[1:-2], K, x.shape[-1]) if x.ndim > 2 else (B, K) for x in tensors]
    return [x.new_empty(shape) for x, shape in zip(tensors, shapes, strict=True)]


def scatter_rows(grad: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo a gather: add rows of ``grad`` to zeros of ``shape`` at ``index``; what is no row goes nowhere."""
    dim = 2 if grad.ndim == 4 else 1
    at = index.view([n if i in (0, dim) else 1 for i, n in enumerate(grad.shape)])
    at = torch.where((at >= 0) & (at < shape[dim]), at, shape[dim])  # lands in one extra row, cut off below
    # sizes may be symbolic, and take no bool
    longer = [n + 1 if i == dim else n for i, n in enumerate(shape)]
    full = grad.new_zeros(grad.shape[0], *longer[1:]).scatter_add(dim, at.expand_as(grad), grad)
    full = full.narrow(dim, 0, shape[dim])
    return full if shape[0] == grad.shape[0] else full.sum(0, keepdim=True)


def save_rows(ctx: Any, tensors: Sequence[Tensor], index: Tensor) -> None:
    """Note what ``scatter_grads`` needs of an op whose first argument is tensors of which it gathers rows."""
    ctx.save_for_backward(index)
    ctx.shapes = [tuple(x.shape) for x in tensors]


def scatter_grads(ctx: Any, grads: Sequence[Tensor | None], *_: Tensor | None) -> tuple[Any, ...]:
    """Gradients of all arguments: of the tensors what was gathered of them, of the others none."""
    (index,) = ctx.saved_tensors
    wanted = zip(grads, ctx.shapes, ctx.needs_input_grad[0], strict=True)
    back = [scatter_rows(g, index, s) if need and g is not None else None for g, s, need in wanted]
    return back, *[None] * (len(ctx.needs_input_grad) - 1)


_gather_tokens.register_autograd(
    scatter_grads, setup_context=lambda ctx, inputs, output: save_rows(ctx, *inputs)
)
