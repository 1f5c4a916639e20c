"""Argument checks that several ops share. Each raises InputError naming the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.errors import check

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_last_dim(arg: str, x: Tensor) -> None:
    """The elements of a row lie side by side."""
    check(x.shape[-1] <= 1 or x.stride(-1) == 1, arg, "a contiguous last dim", f"strides {tuple(x.stride())}")


def check_features(features: Tensor) -> None:
    """Floats ``[B, N, D]`` whose rows lie side by side."""
    check(features.ndim == 3, "features", "rank 3 [B, N, D]", tuple(features.shape))
    check_dtype("features", features, *FLOATS)
    check_last_dim("features", features)


def check_tensor(
    arg: str, x: Tensor | None, dtypes: Sequence[torch.dtype], shape: Sequence[int | str], like: Tensor
) -> None:
    """A tensor of one of these dtypes, of this shape and on the device of ``like``; or None."""
    if x is not None:
        check_dtype(arg, x, *dtypes)
        check_shape(arg, x, shape)
        check_device(arg, x, like.device)


def check_dtype(arg: str, x: Tensor, *dtypes: torch.dtype) -> None:
    """A tensor of one of these dtypes."""
    check(isinstance(x, Tensor), arg, "a tensor", type(x).__name__)
    if x.dtype not in dtypes:
        *names, last = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        check(False, arg, f"{', '.join(names)} or {last}" if names else last, x.dtype)


def check_shape(arg: str, x: Tensor, shape: Sequence[int | str]) -> None:
    """This shape; where it has a letter, any number."""
    same = [isinstance(n, str) or n == m for n, m in zip(shape, x.shape, strict=False)]
    if x.ndim != len(shape) or not all(same):
        expected = ", ".join([f"{n}" for n in shape])  # torch.compile cannot trace str() of a list
        check(False, arg, f"[{expected}]", tuple(x.shape))


def check_device(arg: str, x: Tensor, device: torch.device) -> None:
    """This device."""
    check(x.device == device, arg, f"the device {device}", x.device)


def check_range(arg: str, x: Tensor, first: Tensor, end: Tensor) -> None:
    """Each entry of ``x [B, n]`` is -1 or in ``[first, end)`` of its sample, both ``[B or 1, 1]``."""
    bad = (x != -1) & ((x < first) | (x >= end))
    if bool(bad.any()):
        b, i = bad.nonzero()[0].tolist()
        low, high = (int(t[b if len(t) > 1 else 0, 0]) for t in (first, end))
        check(False, arg, f"positions in [{low}, {high}) or -1", int(x[b, i]))


def check_reach(index: Tensor, tensors: Sequence[Tensor]) -> None:
    """Each entry of an index on the CPU is a row of every tensor, or -1; kernels mask others: looking would wait for them."""
    if index.device.type == "cpu" and tensors:
        S = min(map(seq_len, tensors))
        check_range("index", index, torch.zeros(1, 1), torch.full((1, 1), S))


def check_tensors(tensors: Sequence[Tensor], B: int, device: torch.device, S: int | None = None) -> None:
    """Tensors ``[B or 1, S]``, ``[B or 1, S, D]`` or ``[B or 1, H, S, D]`` on one device; of length S if that is given."""
    check(isinstance(tensors, list | tuple), "tensors", "a list or tuple of tensors", type(tensors).__name__)
    for i, x in enumerate(tensors):
        arg = f"tensors[{i}]"
        check(isinstance(x, Tensor), arg, "a tensor", type(x).__name__)
        check(x.ndim in (2, 3, 4), arg, "rank 2 [B, S], 3 [B, S, D] or 4 [B, H, S, D]", tuple(x.shape))
        check(x.element_size() <= 8, arg, "a dtype of at most 8 bytes", x.dtype)
        check(x.shape[0] == 1 or x.shape[0] == B, arg, f"a first dim of {B} or 1", tuple(x.shape))
        check(S is None or seq_len(x) == S, arg, f"{S} positions", tuple(x.shape))
        if x.ndim > 2:
            check_last_dim(arg, x)
        check_device(arg, x, device)


def seq_len(x: Tensor) -> int:
    """Length of the sequence dim: 1 for rank 2 and 3, 2 for rank 4."""
    return x.shape[2] if x.ndim == 4 else x.shape[1]


def check_choice(arg: str, got: str, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    check(got in choices, arg, f"one of {', '.join(choices)}", repr(got))


def check_count(arg: str, got: object, most: int | None = None, least: int = 0) -> None:
    """A whole number in least..most, or not less."""
    ok = isinstance(got, int | torch.SymInt) and not isinstance(got, bool)
    expected = f"a whole number >= {least}" if most is None else f"a whole number in {least}..{most}"
    check(ok and got >= least and (most is None or got <= most), arg, expected, repr(got))  # type: ignore[operator]
