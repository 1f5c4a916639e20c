"""Tiny inputs and round ceilings for the microbenchmarks."""

import torch
from micro.ceilings import Ceilings
from micro.inputs import Inputs
from micro.shapes import TINY, Setting


def make_inputs(dtype=torch.float32, rows=5):
    """Tiny Inputs on the CPU."""
    return Inputs(Setting(TINY, dtype, rows, torch.device("cpu")))


def make_ceilings():
    """1 GB/s, 1 TFLOP/s."""
    return Ceilings(1e9, dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 1e12))
