"""Op: the same rows of many keys and values, moved to the front in place, in one launch: memory is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops import reference
from vlmprune.ops._checks import check_device, check_dtype, check_last_dim, check_reach, seq_len
from vlmprune.ops._operator import operator


def compact_kv(caches: Sequence[Tensor], index: Tensor) -> None:
    """Move rows ``index`` of every cache to its front, in that order. In place, and not differentiable.

    Row k becomes what was row ``index[b, k]``. Rows behind the last one kept stay as they are, those of a padded sample
    from its first -1 on included: whoever keeps the cache remembers how many rows count.

    Args:
        caches: keys and values of any number of layers, each ``[B, Hkv, S, D]`` or ``[B, S, D]`` with a contiguous last
            dim, of any dtype up to 8 bytes. S, the heads, D and the strides may differ. No two share memory.
        index: positions ``[B, K]`` int64 of the rows that stay, ascending, -1 = padding on the right; K at most the
            smallest S. On a GPU nothing checks the values, as that would wait for the device: a position outside of
            a cache leaves its row as it is, and the result of an index that does not ascend is undefined (no memory
            outside of the caches is touched).

    Raises:
        InputError: an argument has another rank, shape, dtype, stride or device, requires a gradient or overlaps another,
            or an index on the CPU does not ascend or holds a position that is no row. Nothing was moved.
        BackendError: no backend can run on the device of ``index``.

    Example:
        >>> cache = torch.arange(5.0).view(1, 5, 1)
        >>> ops.compact_kv([cache], torch.tensor([[1, 3]]))
        >>> cache.flatten()  # the first two rows count
        tensor([1., 3., 2., 3., 4.])
    """
    check_dtype("index", index, torch.int64)
    check(index.ndim == 2, "index", "rank 2 [B, K]", tuple(index.shape))
    check(isinstance(caches, list | tuple), "caches", "a list or tuple of tensors", type(caches).__name__)
    for i, x in enumerate(caches):
        _check_cache(f"caches[{i}]", x, index)
    if caches:
        _compact_kv(list(caches), index)


def _check_cache(arg: str, x: Tensor, index: Tensor) -> None:
    """A tensor ``[B, Hkv, S, D]`` or ``[B, S, D]`` that can be written and is long enough."""
    check(isinstance(x, Tensor), arg, "a tensor", type(x).__name__)
    check(x.ndim in (3, 4), arg, "rank 3 [B, S, D] or 4 [B, Hkv, S, D]", tuple(x.shape))
    check(x.element_size() <= 8, arg, "a dtype of at most 8 bytes", x.dtype)
    check(x.shape[0] == index.shape[0], arg, f"a first dim of {index.shape[0]}", tuple(x.shape))
    check_last_dim(arg, x)
    spread = all(stride > 0 or n <= 1 for n, stride in zip(x.shape, x.stride(), strict=True))
    check(spread, arg, "memory of its own for every element", f"strides {tuple(x.stride())}")
    check(not x.requires_grad, arg, "no gradient (it is changed in place)", "requires_grad=True")
    check_device(arg, x, index.device)
    K = index.shape[1]
    check(seq_len(x) >= K, arg, f"at least the {K} positions of index", tuple(x.shape))


def _call(run: Callable[..., Any], caches: list[Tensor], index: Tensor) -> None:
    starts = {x.data_ptr() for x in caches if x.numel()}
    check(len(starts) == sum(x.numel() > 0 for x in caches), "caches", "no memory twice", "one tensor twice")
    if index.device.type == "cpu":
        _check_ascends(index)
    check_reach(index, caches)
    run(caches, index)


@operator(reference.compact_kv, _call, cuda=True, mutates_args=("caches",))
def _compact_kv(caches: list[Tensor], index: Tensor) -> None:
    return None


def _check_ascends(index: Tensor) -> None:
    """Each row rises, up to where its padding begins."""
    before, after = index[:, :-1], index[:, 1:]
    ok = torch.where(after == -1, True, (before != -1) & (after > before)).all(1)
    if not bool(ok.all()):
        b = int(ok.logical_not().nonzero()[0])
        check(False, "index", "positions that ascend, then -1 only", f"sample {b} with {index[b].tolist()}")
