"""Where the tests of models and policies run: the CPU, or the device that ``--device`` names.

A test writes ``torch.zeros(3)`` and means a tensor where its model is. Elsewhere than on the CPU, tests, helpers and
vlmprune.testing therefore see a ``torch`` that makes tensors there. The package and transformers keep the real one: a
device that they forget to name is an error, as it is for a user.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

CHOICES = ("cpu", "cuda", "pretend")
FOLDERS = ("models", "policies")
FACTORIES = {
    *("arange", "empty", "eye", "from_numpy", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros"),
}
CPU = torch.device("cpu")
_here = CPU


def chosen(asked: str | None) -> str:
    """What ``--device`` means on this machine; without it CUDA if there is one."""
    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        raise pytest.UsageError("--device: expected cpu or pretend, as torch finds no CUDA device, got cuda")
    return asked or ("cuda" if has_cuda else "cpu")


def placed(x: Any) -> Any:
    """A module, a tensor, or a dict of tensors, on the device of the running test."""
    return {name: value.to(_here) for name, value in x.items()} if isinstance(x, dict) else x.to(_here)


class TorchThere:
    """``torch`` for those who say no device. Made on the CPU and moved: random numbers are the same everywhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return self._moved(found) if name in FACTORIES else found

    def _moved(self, factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = factory(*args, **kwargs)
            return made if "device" in kwargs else made.to(self._device)

        return make


@contextmanager
def tensors_on(device: torch.device, test: ModuleType) -> Iterator[None]:
    """Inside, what a test module, the helpers and vlmprune.testing make lies on ``device``."""
    global _here
    own = ("helpers.device", "helpers.pretended")
    users = [m for name, m in sys.modules.items() if name.startswith(("helpers.", "vlmprune.testing."))]
    with pytest.MonkeyPatch.context() as patch:
        for module in (test, *users):
            if module.__name__ not in own and getattr(module, "torch", None) is torch:
                patch.setattr(module, "torch", TorchThere(device))
        _here = device
        try:
            yield
        finally:
            _here = CPU


@contextmanager
def exact() -> Iterator[None]:
    """Inside, float32 is float32: no TF32 in matrix products and convolutions, so that the CPU's tolerances do."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
