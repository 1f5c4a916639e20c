"""The launches that choose, cluster, match and merge tokens, at the shapes of LLaVA-1.5, LLaVA-NeXT and beyond.

test_resources.py compiles each of them. Run in a process of its own: TRITON_INTERPRET=0 python -m pytest tests/compile.
"""

import re

import pytest
import torch
import triton

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter cannot compile; run with TRITON_INTERPRET=0", allow_module_level=True)

from helpers import offline
from vlmprune.triton_kernels import (
    cluster_dpc,
    greedy_select,
    match_bipartite,
    merge_tokens,
    select_segments,
    select_topk,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
meta = offline.meta


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


def match(N, r, D, dtype=BF16, destinations=None, masked=False):
    given = None if destinations is None else meta(destinations, dtype=torch.int64)
    mask = meta(2, N, dtype=torch.bool) if masked else None
    features = meta(2, N, D, dtype=dtype)
    return lambda: match_bipartite.match_bipartite(features, r, given, mask, N - r)


def select(N, keep, threshold, dtype=FP32, coded=False):
    code = meta(2, N, dtype=torch.int8) if coded else None
    keep = meta(2, dtype=torch.int64) if coded else keep
    return lambda: select_topk.select_topk(meta(2, N, dtype=dtype), keep, code, N, threshold)


def segments(lengths, quota, dtype=FP32):
    scores = meta(2, sum(lengths), dtype=dtype)
    return lambda: select_segments.select_segments(scores, lengths, [min(quota, n) for n in lengths])


LAUNCHES = {
    "maxmin bf16 576": greedy("maxmin", 576, 64, 4096),
    "maxmin bf16 2880": greedy("maxmin", 2880, 640, 1024),
    "maxmin fp32 2880": greedy("maxmin", 2880, 640, 4096, FP32, masked=False),
    "dpp bf16 576": greedy("dpp", 576, 64, 4096, masked=False),
    "dpp bf16 2880": greedy("dpp", 2880, 640, 4096),
    "dpp fp16 2880": greedy("dpp", 2880, 640, 1024, FP16),
    "coverage bf16 576": greedy("coverage", 576, 64, 4096),
    "coverage bf16 2880": greedy("coverage", 2880, 640, 4096),
    "coverage fp32 5001": greedy("coverage", 5001, 33, 1000, FP32),
    "nms bf16 2880": greedy("nms", 2880, 640, 4096),
    "nms fp16 577": greedy("nms", 577, 100, 1000, FP16, masked=False),
    "cluster bf16 83": cluster(83, 9, 4096),
    "cluster fp32 864": cluster(864, 87, 4096, FP32, masked=False),
    "merge bf16 mean": merge(576, 30, 4096),
    "merge bf16 mean, many clusters": merge(2880, 1440, 4096, weighted=True),
    "merge fp32 sum weighted": merge(577, 640, 1000, FP32, "sum", weighted=True),
    "match bf16 576": match(576, 288, 1024),
    "match bf16 2880": match(2880, 1440, 4096),
    "match bf16 2880, destinations given, masked": match(2880, 2000, 4096, destinations=720, masked=True),
    "match fp16 32768": match(32768, 16384, 1024, FP16),
    "match fp32 5001": match(5001, 100, 1000, FP32),
    "match fp32 2880, destinations given, masked": match(2880, 2000, 4096, FP32, 720, True),
    "match bf16, all ones": match(2, 1, 1),
    "match bf16, all ones, destinations given": match(2, 1, 1, destinations=1, masked=True),
    "select above 0.5 fp32 N=2880": select(2880, 2880, 0.5),
    "select above a row's own bf16 N=2880 coded": select(2880, None, meta(2, dtype=FP32), BF16, coded=True),
    "select above 0.5 fp32 N=65536 coded": select(65536, None, 0.5, coded=True),
    "select in one segment of one": segments([1], 1),
    "select in 5 segments fp32": segments([576] * 4 + [100], 64),
    "select in 64 segments bf16": segments(list(range(100, 164)), 64, BF16),
    "select in long segments fp32": segments([2048, 12000], 640),
    "select in segments of 2048 bf16": segments([2048, 1], 640, BF16),
}


def test_products_use_the_tensor_cores():
    for name, kernel in (("maxmin bf16 576", "_cosine_kernel"), ("match bf16 576", "_best_match_kernel")):
        compiled = offline.compile_launches(LAUNCHES[name], 90)
        (found,) = (k for k in compiled if k.name == kernel)
        assert re.search(r"\b(wgmma|mma)\S*\.bf16", found.ptx)


@pytest.mark.parametrize("m, launches", [(33, 1), (65, 2)])
def test_segments_share_a_launch(m, launches):
    """Whatever their lengths; and other lengths need no other code."""
    lengths = list(range(1, m + 1))
    compiled = [offline.compile_launches(segments(some, 5), 90) for some in (lengths, lengths[::-1])]
    assert [len(kernels) for kernels in compiled] == [launches] * 2
    assert [kernel.ptx for kernel in compiled[0]] == [kernel.ptx for kernel in compiled[1]]


def test_barriers_publish_matches_and_slots():
    """In match_bipartite other threads read back what some wrote: two barriers that no reduction brings about."""
    (kernel,) = (
        k for k in offline.compile_launches(LAUNCHES["match bf16 576"], 90) if k.name == "_number_kernel"
    )
    before_last_pass = kernel.ptx[: kernel.ptx.rindex("ld.global")]
    assert "bar.sync" in before_last_pass[before_last_pass.rindex("st.global") :]
