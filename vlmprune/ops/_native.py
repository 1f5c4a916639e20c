"""The door to the CUDA C++ extension: whether it can run, and its ops, loaded at first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
OLDEST_GPU = (8, 0)


@cache
def needs_extension(device: torch.device, forced: bool) -> str | None:
    """Return why the extension cannot run on ``device``, or None if it can.

    Cached: dispatch asks at every call, and within a process the answer stays the same.
    """
    if not LIBRARY.exists():
        return "the CUDA extension is not built (VLMPRUNE_BUILD_CUDA=1 pip install --no-build-isolation .)"
    if device.type != "cuda":
        return f"needs a CUDA tensor, got one on {device.type}"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return "needs compute capability {}.{} or newer, got {}.{}".format(*OLDEST_GPU, *capability)
    return None


def load(op: str) -> Callable[..., Any]:
    """Return the extension's ``op``; it takes the arguments of the function of that name in ``reference``."""
    return getattr(_namespace(), op)


@cache
def _namespace() -> Any:
    """Load the library, which registers its ops under a private namespace."""
    torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    return torch.ops._vlmprune_C
