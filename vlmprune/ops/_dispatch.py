"""Choose which backend runs an op, or say why none can."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from vlmprune.env import INTERPRETED
from vlmprune.errors import BackendError, check_known
from vlmprune.ops import _native

NAMES = ("cuda", "triton", "reference")
TABLES: dict[str, tuple[Backend, ...]] = {}
"""Op name -> its backends in preference order; filled by the op files, read by ``vlmprune info``."""

_forced: ContextVar[str | None] = ContextVar("vlmprune_backend", default=None)


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to compute an op: a lazy import plus the reason it may not be usable.

    ``why_not(device, forced)`` returns None if the backend can run there, else the reason.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    why_not: Callable[[torch.device, bool], str | None]


def always(device: torch.device, forced: bool) -> str | None:
    """The reference runs anywhere."""
    return None


@cache
def _has_triton() -> bool:
    """Looked up once: dispatch asks at every call."""
    return importlib.util.find_spec("triton") is not None


def needs_triton(device: torch.device, forced: bool) -> str | None:
    """Triton runs on CUDA tensors; the interpreter runs it on CPU tensors, far too slowly to be a default."""
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cuda":
        return "TRITON_INTERPRET=1 is set; unset it to compile for the GPU" if INTERPRETED else None
    if not INTERPRETED:
        return f"needs a CUDA tensor, got one on {device.type} (TRITON_INTERPRET=1 runs it there for tests)"
    return None if forced else "the interpreter is used only when forced by use_backend('triton')"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend by name inside the block: ``"reference"``, ``"triton"`` or ``"cuda"``.

    An op that cannot run on the forced backend raises BackendError with the reasons.

    Example:
        >>> with ops.use_backend("reference"):
        ...     ops.select_topk(torch.tensor([[0.3, 0.9, 0.1]]), 2)[0]
        tensor([[0, 1]])
    """
    check_known(name, NAMES, "name")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def register(
    op: str, reference: Callable[..., Any] | None, *, kernels: str | None = None, cuda: bool = False
) -> None:
    """Enter an op's backends, best first: the extension's op, the launcher and the reference, all of its name.

    The launcher is in the kernel file of that name too, or in ``kernels``.
    """
    table = [Backend("triton", lambda: _launcher(kernels or op, op), needs_triton)]
    if cuda:
        table.insert(0, Backend("cuda", lambda: _native.load(op), _native.needs_extension))
    if reference is not None:
        table.append(Backend("reference", lambda: reference, always))
    TABLES[op] = tuple(table)


@cache
def _launcher(kernels: str, op: str) -> Callable[..., Any]:
    """Imports Triton, when an op is first launched."""
    return getattr(importlib.import_module(f"vlmprune.triton_kernels.{kernels}"), op)


@lru_cache(512)
def _route(
    backends: tuple[Backend, ...], device: torch.device, forced: str | None
) -> tuple[Backend | None, tuple[str, ...]]:
    """The first usable backend, and the reasons against those before it. Remembered: the hot path asks at every call."""
    tried: list[str] = []
    for backend in backends:
        if forced not in (None, backend.name):
            tried.append(f"{backend.name}: not the forced backend {forced!r}")
            continue
        reason = backend.why_not(device, forced is not None)
        if reason is None:
            return backend, tuple(tried)
        tried.append(f"{backend.name}: {reason}")
    return None, tuple(tried)


def choose(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """Return the first usable backend of ``op`` for ``x``; raise BackendError with all reasons."""
    forced = _forced.get()
    backend, tried = _route(TABLES[op], x.device, forced)
    if backend is None:
        if forced is not None and forced not in [b.name for b in TABLES[op]]:
            tried += (f"{forced}: {op} has no such backend",)
        header = f"no backend can run {op} on {tuple(x.shape)} {x.dtype} {x.device}"
        raise BackendError("\n  ".join([header, *tried]))
    return _on_device_of(x, backend.load())


def _on_device_of(x: torch.Tensor, run: Callable[..., Any]) -> Callable[..., Any]:
    """Make the GPU of ``x`` current while ``run`` launches: a model may be spread over several."""
    if x.device.type != "cuda":
        return run

    def guarded(*args: Any) -> Any:
        with torch.cuda.device(x.device):
            return run(*args)

    return guarded


def can_run(op: str, x: torch.Tensor) -> bool:
    """Whether some backend of ``op`` is usable for ``x``.

    Example:
        >>> ops.can_run("gather_tokens", torch.zeros(1))  # the reference runs anywhere
        True
    """
    return _route(TABLES[op], x.device, _forced.get())[0] is not None


def launches(op: str, x: torch.Tensor) -> bool:
    """Whether it is a kernel that ``choose`` takes, and not the reference."""
    backend = _route(TABLES[op], x.device, _forced.get())[0]
    return backend is not None and backend.name != "reference"


def backend_of(op: str, x: torch.Tensor) -> str:
    """The backend that ``choose`` takes, with the reasons against those before it: "reference (triton: ...)".

    Example:
        >>> ops.backend_of("gather_tokens", torch.zeros(1)).split(" ")[0]
        'reference'
    """
    backend, tried = _route(TABLES[op], x.device, _forced.get())
    name = "none" if backend is None else backend.name
    return f"{name} ({'; '.join(tried)})" if tried else name


def explain(op: str, device: torch.device) -> list[tuple[str, str | None]]:
    """List (backend, reason it cannot run on ``device`` or None), in preference order."""
    return [(b.name, b.why_not(device, False)) for b in TABLES[op]]
