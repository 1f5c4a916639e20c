"""Puts benchmarks/ (and nothing else of the checkout) on the path: it is a folder of scripts, not an installed package."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from micro.ceilings import Ceilings  # noqa: E402
from micro.inputs import Inputs  # noqa: E402
from micro.shapes import TINY, Setting  # noqa: E402


@pytest.fixture
def make_inputs():
    """Return a function (dtype, rows) -> tiny Inputs on the CPU."""
    return lambda dtype=torch.float32, rows=5: Inputs(Setting(TINY, dtype, rows, torch.device("cpu")))


@pytest.fixture
def make_ceilings():
    """Return a function () -> Ceilings of round numbers: 1 GB/s, 1 TFLOP/s."""
    return lambda: Ceilings(1e9, dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 1e12))
