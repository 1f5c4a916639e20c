"""Host time of PrunePlan.run, and of a call bound once, against the ops they repeat, on a machine without a GPU: all Python, none of CUDA.

A stub stands in for the GPU (micro/stub.py). What is timed is everything that Python does in a call; Triton's C launcher,
which packs the arguments, and the CUDA call itself are left out.

    TRITON_INTERPRET=0 python benchmarks/host_launch_cost.py
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from micro.stub import cpu, stubbed

from vlmprune.ops.plan import PrunePlan
from vlmprune.ops.prune_tokens import checked

B, H, S, N, D, KEEP = 1, 32, 640, 576, 128, 128
ROUNDS, CALLS = 20, 200


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
        f"triton {triton.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {cpu()}"
    )
    print("CPU time a call, median of means; no C launcher, no CUDA call")
    with stubbed():
        for n_caches in (0, 2, 60):
            for with_lse in (True, False):
                report(n_caches, with_lse)


if __name__ == "__main__":
    main()
