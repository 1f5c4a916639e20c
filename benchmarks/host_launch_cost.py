"""Host time of PrunePlan.run, and of a call bound once, against the ops they repeat, on a machine without a GPU: all Python, none of CUDA.

A stub driver stands in for the GPU: kernels are compiled for sm_90 and never started. What is timed is everything that
Python does in a call; Triton's C launcher, which packs the arguments, and the CUDA call itself are left out.

    TRITON_INTERPRET=0 python benchmarks/host_launch_cost.py
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vlmprune.ops import _dispatch
from vlmprune.ops.plan import PrunePlan
from vlmprune.ops.prune_tokens import checked

B, H, S, N, D, KEEP = 1, 32, 640, 576, 128, 128
ROUNDS, CALLS = 20, 200


class _Utils:
    """A device that can hold any kernel."""

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, *args: object) -> tuple[int | None, ...]:
        return None, 1, 32, 0, 1024  # no module, so none to unload

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    """Where the C launcher would pack the arguments and call CUDA."""

    def __init__(self, src: object, metadata: object) -> None:
        self.calls = 0

    def __call__(self, *args: object) -> None:
        self.calls += 1


class _StubDriver:
    """What Triton asks of a driver before and when it launches."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> None:
        return None

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def microseconds(call: Callable[[], object]) -> float:
    """Median over rounds of the mean CPU time of a call: other processes do not count."""
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        times.append((time.thread_time() - start) / CALLS * 1e6)
    return median(times)


def example(n_caches: int, with_lse: bool) -> dict[str, Any]:
    """A stage of LLaVA-1.5: hidden states, cos, sin, position ids, and the keys or values of some layers."""
    dtype = torch.bfloat16
    key = torch.zeros(B, H, S, D, dtype=dtype)
    tensors = [torch.zeros(B, S, H * D, dtype=dtype), torch.zeros(B, S, D, dtype=dtype)]
    tensors += [torch.zeros(B, S, D, dtype=dtype), torch.arange(S)[None]]
    lse = torch.zeros(B, H, S) if with_lse else None
    return {
        "query": torch.zeros(B, H, S, D, dtype=dtype),
        "key": key,
        "tensors": tensors + [torch.zeros(B, H, S, D, dtype=dtype) for _ in range(n_caches)],
        "rows": torch.full((B, 1), S - 1),
        "columns": torch.arange(35, 35 + N)[None],
        "lse": lse,
    }


@contextmanager
def stubbed() -> Iterator[None]:
    """Inside, kernels compile for the stub's GPU, launches end at _Launcher, and a plan may be made of CPU tensors."""
    from vlmprune.triton_kernels.prune_tokens import prune_plan

    active, backends = driver._active, _dispatch.TABLES["prune_plan"]
    driver.set_active(_StubDriver())
    _dispatch.TABLES["prune_plan"] = (_dispatch.Backend("stub", lambda: prune_plan, _dispatch.always),)
    try:
        yield
    finally:
        driver._active, _dispatch.TABLES["prune_plan"] = active, backends


def planned(call: dict[str, Any]) -> PrunePlan:
    """The plan of an example."""
    return PrunePlan(**call, keep=KEEP)


def report(n_caches: int, with_lse: bool) -> None:
    """One line of the table."""
    from vlmprune.triton_kernels.prune_tokens import prune_tokens

    call = example(n_caches, with_lse)
    plan, arguments = planned(call), checked(**call, keep=KEEP)
    run, bound = microseconds(lambda: plan.run(**call)), microseconds(plan.bind(**call))
    launchers = microseconds(lambda: prune_tokens(*arguments))
    given = "with LSE" if with_lse else "without LSE"
    print(
        f"{4 + n_caches:3d} tensors, {given:11s}: "
        f"plan.run {run:5.1f} us, bound {bound:5.1f} us, launchers {launchers:6.1f} us"
    )


def main() -> None:
    """Print where this ran, and the table."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("host_launch_cost: expected TRITON_INTERPRET=0, got the interpreter")
    torch.set_num_threads(1)
    print(
        f"triton {triton.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {_cpu()}"
    )
    print("CPU time a call, median of means; no C launcher, no CUDA call")
    with stubbed():
        for n_caches in (0, 2, 60):
            for with_lse in (True, False):
                report(n_caches, with_lse)


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
