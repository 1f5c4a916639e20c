"""A GPU that is not there: kernels are compiled for sm_90 and never started, and vlmprune's ops take CPU tensors to them.

What is left of a call is the Python and the PyTorch in it, so its host time can be taken on any machine. Triton's C launcher,
which packs the arguments, and the CUDA call itself are left out. Needs TRITON_INTERPRET=0.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vlmprune.ops import _dispatch
from vlmprune.ops.scoring import Scoring
from vlmprune.ops.selection import Selection

Function = Callable[..., Any]


class _Utils:
    """A device that can hold any kernel."""

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, *args: object) -> tuple[int | None, ...]:
        return None, 1, 32, 0, 1024  # no module, so none to unload

    def unload_module(self, module: object) -> None:
        pass


class Launcher:
    """Where the C launcher would pack the arguments and call CUDA."""

    launches = 0  # of all kernels

    def __init__(self, src: object, metadata: object) -> None:
        pass

    def __call__(self, *args: object) -> None:
        Launcher.launches += 1


class _StubDriver:
    """What Triton asks of a driver before and when it launches."""

    utils, launcher_cls = _Utils(), Launcher

    def get_current_device(self) -> None:
        return None

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def stubbed() -> Iterator[None]:
    """Inside, kernels compile for the stub's GPU, launches end at Launcher, and a plan may be made of CPU tensors."""
    active, backends = driver._active, _dispatch.TABLES["prune_plan"]
    load = _triton("prune_plan").load
    driver.set_active(_StubDriver())
    _dispatch.TABLES["prune_plan"] = (_dispatch.Backend("triton", load, _dispatch.always),)
    try:
        yield
    finally:
        driver._active, _dispatch.TABLES["prune_plan"] = active, backends


class Filling:
    """Gives what no kernel has filled numbers that a model can go on with: positions that count up from 0.

    Attributes:
        on: whether it does.
        seconds: how long that took, so that a measurement can take it off; what it costs the caches nobody can.
    """

    def __init__(self) -> None:
        self.on, self.seconds, self._unseen = True, 0.0, 0.0
        calls, start = 1000, time.thread_time()
        for _ in range(calls):
            self([])
        self._unseen = (time.thread_time() - start - self.seconds) / calls  # of a call: not in seconds

    def __call__(self, tensors: Any) -> None:
        """Fill the lists in ``tensors``; a list ``[B]`` says how many entries of the others are in use: all."""
        if not self.on:
            return
        start = time.thread_time()
        lists = [x for x in _tensors(tensors) if x.dtype == torch.int64]
        width = next((x.shape[1] for x in lists if x.ndim == 2), 0)
        for x in lists:
            if x.ndim == 1:
                x.fill_(width)
            else:
                x.copy_(_order(x.shape[1]))
        self.seconds += time.thread_time() - start + self._unseen


@cache
def _order(n: int) -> Tensor:
    return torch.arange(n)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for x in values:
            yield from _tensors(x)


@contextmanager
def launching() -> Iterator[Filling]:
    """``stubbed``, and every op that has kernels launches them, and looks at no entry of its arguments, as on a GPU."""
    tables, filling = {**_dispatch.TABLES}, Filling()
    looks = [(record, record.check_values) for record in (Scoring, Selection)]
    with stubbed():
        _dispatch.TABLES.update({op: (_filled(op, filling),) for op in tables if _has_kernels(tables[op])})
        for record, _ in looks:
            record.check_values = lambda *_: None  # type: ignore[assignment]
        try:
            yield filling
        finally:
            _dispatch.TABLES.update(tables)
            for record, look in looks:
                record.check_values = look  # type: ignore[assignment]


def _has_kernels(table: Sequence[_dispatch.Backend]) -> bool:
    return any(backend.name == "triton" for backend in table)


def _triton(op: str) -> _dispatch.Backend:
    return next(backend for backend in _dispatch.TABLES[op] if backend.name == "triton")


def _filled(op: str, filling: Filling) -> _dispatch.Backend:
    """An op's launcher for tensors anywhere, whose outputs are filled."""
    launcher = _triton(op).load

    @cache
    def load() -> Function:
        launch = launcher()
        if op == "prune_plan":
            return lambda *args: _filled_plan(launch, filling, *args)

        def run(*args: Any) -> Any:
            out = launch(*args)
            filling(out)
            return out

        return run

    return _dispatch.Backend("triton", load, _dispatch.always)


def _filled_plan(build: Function, filling: Filling, op: str, arguments: Any, inputs: Sequence[Tensor]) -> Any:
    """A plan's program, every run of which fills its outputs."""
    program, outputs = build(op, arguments, inputs)
    launch, n = program.run, len(inputs)

    def run(tensors: Sequence[Tensor], pointers: Sequence[int]) -> None:
        launch(tensors, pointers)
        filling(tensors[n:])

    program.run = run
    return program, outputs


def cpu() -> str:
    """The processor that the times are of."""
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    return names[0] if names else platform.machine()
