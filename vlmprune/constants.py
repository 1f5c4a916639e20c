"""Small tensors that depend on host numbers alone (counts, grids, last rows): made once, so that a prefill builds none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Make = TypeVar("Make", bound=Callable[..., Tensor])


class _Given(threading.local):
    """Where this thread notes what it is given."""

    into: list[Tensor] | None = None


_given = _Given()


@contextmanager
def noting() -> Iterator[list[Tensor]]:
    """A block whose tensors from here are listed: a captured graph reads them at their addresses, so they must stay."""
    before, _given.into = _given.into, []
    try:
        yield _given.into
    finally:
        _given.into = before


def remembered(most: int = 256) -> Callable[[Make], Make]:
    """Decorates a function of hashable arguments that makes a tensor: the latest ``most`` are kept.

    It builds on the CPU and copies to the device, waiting for the copy: other streams may read what is kept. Who is given
    the tensor must not write to it; one that was written to is made anew, so that no other model sees it.
    """

    def decorate(make: Make) -> Make:
        @lru_cache(most)
        def cached(*args: Any) -> tuple[Tensor, int]:
            with torch.inference_mode(False):  # an inference tensor could not take part in training later
                new = make(*args)
            return new, new._version

        @wraps(make)
        def known(*args: Any) -> Tensor:
            found, version = cached(*args)
            if found._version != version:
                cached.cache_clear()
                found = cached(*args)[0]
            if type(found) is not Tensor:  # a fake tensor, which belongs to a mode
                cached.cache_clear()
            if _given.into is not None:
                _given.into.append(found)
            return found

        return known  # type: ignore[return-value]

    return decorate


@remembered()
def whole_numbers(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """int64, of numbers or of tuples of numbers, which are filled up with 0.

    Example:
        >>> whole_numbers(((1, 2), (3,)), torch.device("cpu"))
        tensor([[1, 2],
                [3, 0]])
    """
    if values and isinstance(values[0], tuple):
        width = max(map(len, values))
        values = tuple((*row, *[0] * (width - len(row))) for row in values)
        return torch.tensor(values, dtype=torch.int64).view(len(values), width).to(device)
    return torch.tensor(values, dtype=torch.int64).to(device)


@remembered()
def filled(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor full of one value."""
    return torch.full(shape, value, dtype=dtype).to(device)


@remembered()
def counting(batch: int, n: int, device: torch.device, first: int = 0) -> Tensor:
    """n numbers from ``first`` on for every sample: ``[batch, n]`` int64."""
    return torch.arange(first, first + n).repeat(batch, 1).to(device)
