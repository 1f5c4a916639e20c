"""Who computes a case: our backends that run here, and the others, each with the reason why it may not run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlmprune import ops
from vlmprune.ops._dispatch import explain

from .inputs import Inputs

Run = Callable[[Inputs], Any]


def always(x: Inputs) -> str | None:
    """Runs anywhere."""
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute a case; ``why_not(inputs)`` is None or the reason it cannot run on them."""

    name: str
    run: Run
    why_not: Callable[[Inputs], str | None] = always


def backends(op: str, run: Run) -> list[Provider]:
    """Our op once per backend, best first; the interpreter is no backend to measure."""

    def forced(name: str) -> Run:
        def call(x: Inputs) -> Any:
            with ops.use_backend(name):
                return run(x)

        return call

    def reason(name: str) -> Callable[[Inputs], str | None]:
        return lambda x: dict(explain(op, x.device))[name]

    names = [backend for backend, _ in explain(op, torch.device("cpu"))]
    return [Provider(name, forced(name), reason(name)) for name in names]


def eager(run: Run) -> Provider:
    """Needs the memory of several S x S matrices a head."""
    return Provider("eager", run, matrix_fits)


def colreduce(run: Run) -> Provider:
    """The PyPI package flash-colreduce."""
    return Provider("flash-colreduce", run, needs_colreduce)


def compiled(run: Run) -> Provider:
    """The plain PyTorch version under torch.compile, with the shapes of this setting; compiled at the first call."""
    made: list[Run] = []

    def call(x: Inputs) -> Any:
        if not made:
            torch.compiler.reset()  # or the shapes of the last setting would make this one dynamic
            # once before, so that its inputs are drawn: Dynamo cannot trace that, and would leave the rest uncompiled
            run(x)
            options = {"compile_threads": 1}  # worker processes that start up disturb whatever is timed next
            made.append(torch.compile(run, dynamic=False, options=options))
        return made[0](x)

    return Provider("torch.compile", call)


def needs_colreduce(x: Inputs) -> str | None:
    """It is a CUDA-only package that need not be installed."""
    if importlib.util.find_spec("flash_colreduce") is None:
        return "flash-colreduce is not installed"
    return None if x.device.type == "cuda" else "flash-colreduce needs a CUDA tensor"


def matrix_fits(x: Inputs) -> str | None:
    """Logits and weights in the dtype, logits and softmax in float32."""
    cells = x.model.heads * x.shape.length**2
    needed = cells * (2 * x.dtype.itemsize + 8)
    free = _free_bytes(x.device)
    if needed <= free:
        return None
    return f"the attention matrices take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB may be used"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the last provider left in PyTorch's pool is free, too
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
