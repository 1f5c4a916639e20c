"""The microbenchmarks under pytest-benchmark: the table of ``microbench.py``, one test a provider, launch overhead included."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from micro.cases import Case
from micro.inputs import Inputs
from micro.rows import NAMES
from micro.shapes import SHAPES, Setting
from micro.sweep import Sweep

GPU = torch.cuda.is_available()
SWEEP = Sweep(
    torch.device("cuda" if GPU else "cpu"),
    shapes=SHAPES if GPU else SHAPES[:1],
    dtypes=[torch.bfloat16 if GPU else torch.float32],
    rows=(1, 64),
    modes=("call",),
    seconds=0.0,
)


def name_of(case: Case, setting: Setting) -> str:
    rows = f", {setting.n_rows} rows" if case.scored else ""
    return f"{case.name}, {setting.shape.name}, {NAMES[setting.dtype]}{rows}"


CASES = [
    pytest.param(case, setting, provider, id=f"{name_of(case, setting)}, {provider.name}")
    for case, setting in SWEEP.settings()
    for provider in case.providers()
    if SWEEP.wanted(provider, setting)
]


@lru_cache(maxsize=2)  # a long prompt fills gigabytes
def inputs(setting: Setting) -> Inputs:
    return Inputs(setting)


@pytest.mark.parametrize("case, setting, provider", CASES)
def test_op(benchmark, case, setting, provider) -> None:
    x = inputs(setting)
    reason = provider.why_not(x)
    if reason is not None:
        pytest.skip(reason)
    case.gate(x, provider.run)

    def call() -> None:
        provider.run(x)
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = name_of(case, setting)
    benchmark(call)
