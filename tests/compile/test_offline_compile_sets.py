"""The kernels that choose, cluster and merge tokens compile without spills at the shapes of LLaVA-1.5, LLaVA-NeXT and beyond.

Run in a process of its own: TRITON_INTERPRET=0 python -m pytest tests/compile.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import triton

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter cannot compile; run with TRITON_INTERPRET=0", allow_module_level=True)

from triton.runtime.jit import JITFunction

from vlmprune.triton_kernels import cluster_dpc, greedy_select, merge_tokens, pairwise_cosine

spec = importlib.util.spec_from_file_location("_offline_sets", Path(__file__).with_name("_offline.py"))
offline = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = offline  # a dataclass looks its module up
spec.loader.exec_module(offline)

MODULES = (cluster_dpc, greedy_select, merge_tokens, pairwise_cosine)
ARCHS = [80, 90, 100]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def jitted():
    return [value for module in MODULES for value in vars(module).values() if isinstance(value, JITFunction)]


offline.kernels = (
    jitted  # of this copy of the helper only: whose compilations it forgets between architectures
)


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def greedy(rule, N, keep, D, dtype=BF16, masked=True):
    relevance = None if rule == "maxmin" else meta(2, N, dtype=FP32)
    mask = meta(2, N, dtype=torch.bool) if masked else None
    return lambda: greedy_select.greedy_select(meta(2, N, D, dtype=dtype), keep, rule, relevance, 0.5, mask)


def cluster(N, clusters, D, dtype=BF16, masked=True):
    mask = meta(2, N, dtype=torch.bool) if masked else None
    return lambda: cluster_dpc.cluster_dpc(meta(2, N, D, dtype=dtype), clusters, clusters, mask)


def merge(N, clusters, D, dtype=BF16, mode="mean", weighted=False):
    assignment = meta(2, N, dtype=torch.int64)
    weights = meta(2, N, dtype=dtype) if weighted else None
    features = meta(2, N, D, dtype=dtype)
    return lambda: merge_tokens.merge_tokens(features, assignment, clusters, mode, weights)


LAUNCHES = {
    "maxmin bf16 576": greedy("maxmin", 576, 64, 4096),
    "maxmin fp32 2880": greedy("maxmin", 2880, 640, 4096, FP32, masked=False),
    "dpp bf16 576": greedy("dpp", 576, 64, 4096, masked=False),
    "dpp fp16 2880": greedy("dpp", 2880, 640, 1024, FP16),
    "coverage bf16 576": greedy("coverage", 576, 64, 4096),
    "coverage bf16 2880": greedy("coverage", 2880, 640, 4096),
    "coverage fp32 5001": greedy("coverage", 5001, 33, 1000, FP32),
    "nms bf16 2880": greedy("nms", 2880, 640, 4096),
    "nms fp16 577": greedy("nms", 577, 100, 1000, FP16, masked=False),
    "cluster bf16 83": cluster(83, 9, 4096),
    "cluster fp32 864": cluster(864, 87, 4096, FP32, masked=False),
    "merge bf16 mean": merge(576, 30, 4096),
    "merge fp32 sum weighted": merge(577, 640, 1000, FP32, "sum", weighted=True),
}


@pytest.mark.parametrize("arch", ARCHS, ids="sm_{}".format)
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES.keys())
def test_compiles_without_spills(launch, arch):
    """Also proves that a launcher never waits for the device: a meta tensor has no value to wait for."""
    kernels = offline.compile_launches(launch, arch)
    assert kernels
    for kernel in kernels:
        assert (kernel.spill_stores, kernel.spill_loads) == (0, 0), kernel.summary()
        assert kernel.shared <= offline.SHARED_LIMIT[arch], kernel.summary()
        assert not re.search(r"\b(atom|red)\.(?!\S*shared)", kernel.ptx), f"{kernel.name}: a global atomic"


def test_every_kernel_is_compiled():
    names = ("coverage bf16 576", "cluster bf16 83", "merge bf16 mean")
    launched = {kernel.name for name in names for kernel in offline.compile_launches(LAUNCHES[name], 90)}
    assert launched == {kernel.__name__ for kernel in jitted() if kernel.__name__.endswith("_kernel")}


def test_cosines_use_the_tensor_cores():
    compiled = offline.compile_launches(LAUNCHES["maxmin bf16 576"], 90)
    (cosine,) = (kernel for kernel in compiled if kernel.name == "_cosine_kernel")
    assert re.search(r"\b(wgmma|mma)\S*\.bf16", cosine.ptx)
