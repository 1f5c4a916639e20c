"""merge_tokens: both backends against slow float64 loops; then what is ignored, what is empty, and error text."""

import math

import pytest
import torch
from torch.library import opcheck

from vlmprune import ops
from vlmprune.ops.merge_tokens import merge_tokens

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def run(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return merge_tokens(*args, **kwargs)


def make(B, N, D, C, dtype=torch.float32, device="cpu", seed=0):
    """Features, an assignment with ignored tokens, and weights of both signs."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, N, D, generator=g).to(device, dtype)
    assignment = torch.randint(-1, max(C, 1), (B, N), generator=g).to(device)
    return features, assignment, (torch.rand(B, N, generator=g) - 0.3).to(device, dtype)


def by_definition(features, assignment, clusters, mode, weights):
    B, N, D = features.shape
    out = torch.zeros(B, clusters, D, dtype=torch.float64)
    for b in range(B):
        for c in range(clusters):
            mine = [n for n in range(N) if assignment[b, n] == c]
            w = {n: 1.0 if weights is None else float(weights[b, n]) for n in mine}
            total = sum(w.values()) if mode == "mean" else 1.0
            for n in mine:
                out[b, c] += w[n] * features[b, n].double().cpu() / total
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("B, N, D, C", [(2, 37, 20, 5), (1, 65, 130, 12), (2, 1, 1, 1)])
def test_is_the_definition(backend, dtype, mode, weighted, B, N, D, C, device):
    features, assignment, weights = make(B, N, D, C, dtype, device)
    weights = weights.abs() if weighted else None
    out = run(backend, features, assignment, C, mode=mode, weights=weights)
    assert out.dtype == dtype and out.shape == (B, C, D) and out.is_contiguous()
    expected = by_definition(features, assignment, C, mode, weights)
    largest = by_definition(features.abs(), assignment, C, mode, weights)  # bounds what cancels
    floor = 2**-24 if dtype == torch.float16 else 0.0  # half of its smallest step below 2^-14
    assert ((out.double().cpu() - expected).abs() <= 2 * ROUNDING[dtype] * largest + floor).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_whole_numbers_are_exact(backend, mode, device):
    """No order of addition changes them: every token is counted once, whatever its weight's sign."""
    features, assignment, weights = make(2, 100, 70, 9, device=device)
    features, weights = (features * 8).round(), (weights * 4).round()
    weights[1] = -weights[1]
    in_first = assignment[0] == 0
    weights[0, in_first] = torch.tensor([2.0, -2.0] + [0.0] * (int(in_first.sum()) - 2), device=device)
    out = run(backend, features, assignment, 9, mode=mode, weights=weights)
    total = by_definition(torch.ones_like(features), assignment, 9, "sum", weights)
    expected = by_definition(features, assignment, 9, "sum", weights)
    if mode == "mean":
        assert (total == 0).any() and (total < 0).any()
        expected = torch.where(total == 0, 0.0, expected / total)
    assert torch.equal(out.cpu(), expected.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_ignored_tokens_may_hold_anything(backend, mode, device):
    features, assignment, weights = make(2, 30, 12, 4, device=device)
    expected = run(backend, features, assignment, 4, mode=mode, weights=weights)
    ignored = assignment < 0
    assert ignored.any()
    features, weights = (
        features.masked_fill(ignored[..., None], math.nan),
        weights.masked_fill(ignored, math.inf),
    )
    for outside in (-1, -7, 4, 1 << 40):
        at = assignment.masked_fill(ignored, outside)
        assert torch.equal(run(backend, features, at, 4, mode=mode, weights=weights), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_a_cluster_of_no_weight_is_zero(backend, mode, device):
    features, assignment, weights = make(1, 12, 5, 3, device=device)
    assignment[assignment == 1] = 0
    out = run(backend, features, assignment, 3, mode=mode)
    assert out[0, 1].tolist() == [0.0] * 5 and (out[0, 2] != 0).all()
    assert not run(backend, features, assignment, 3, mode=mode, weights=torch.zeros_like(weights)).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_sums_stay_in_their_cluster(backend, device):
    features = torch.tensor([[[math.inf], [1.0], [math.nan], [2.0]]], device=device)
    assignment = torch.tensor([[0, 1, 2, 1]], device=device)
    out = run(backend, features, assignment, 3)[0, :, 0].tolist()
    assert out[:2] == [math.inf, 1.5] and math.isnan(out[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, N, D, C", [(0, 3, 2, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 2, 0)])
def test_empty(backend, B, N, D, C, device):
    features, assignment, _ = make(B, N, D, C, device=device)
    out = run(backend, features, assignment, C)
    assert out.shape == (B, C, D) and (N > 0 or not out.any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_repeats_and_batches_change_nothing(backend, device):
    wide, assignment, weights = make(3, 80, 60, 6, device=device)
    args = (wide[:, ::2, 3:40], assignment[:, ::2], 6)
    out = run(backend, *args, weights=weights[:, 1::2])
    assert torch.equal(out, run(backend, *args, weights=weights[:, 1::2]))
    packed = run(
        backend, args[0].contiguous(), args[1].contiguous(), 6, weights=weights[:, 1::2].contiguous()
    )
    assert torch.equal(out, packed)
    one = run(backend, args[0][1:2], args[1][1:2], 6, weights=weights[1:2, 1::2])
    assert torch.equal(out[1:2], one)


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_schema_and_fake_agree(mode, weighted, device):
    features, assignment, weights = make(2, 7, 5, 3, torch.float16, device)
    args = (features, assignment, 3, mode, weights if weighted else None)
    opcheck(torch.ops.vlmprune.merge_tokens.default, args)


def test_compiles_without_graph_breaks(device):
    features, assignment, weights = make(2, 9, 5, 3, device=device)

    def merge(features, assignment, weights):
        return merge_tokens(features, assignment, 3, weights=weights) * 2

    compiled = torch.compile(merge, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(features, assignment, weights), merge(features, assignment, weights))


X, A, W = torch.zeros(2, 6, 4), torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6)
ERRORS = [
    ((X[0], A, 1), {}, r"^features: expected rank 3 \[B, N, D\], got \(6, 4\)$"),
    ((X.double(), A, 1), {}, r"^features: expected float32, float16 or bfloat16, got torch\.float64$"),
    ((X.mT, A, 1), {}, r"^features: expected a contiguous last dim, got strides \(24, 1, 4\)$"),
    ((X, A.int(), 1), {}, r"^assignment: expected int64, got torch\.int32$"),
    ((X, A[:, :5], 1), {}, r"^assignment: expected \[2, 6\], got \(2, 5\)$"),
    ((X, A.to("meta"), 1), {}, r"^assignment: expected the device cpu, got meta$"),
    ((X, A, -1), {}, r"^clusters: expected a whole number >= 0, got -1$"),
    ((X, A, 1.0), {}, r"^clusters: expected a whole number >= 0, got 1\.0$"),
    ((X, A, True), {}, r"^clusters: expected a whole number >= 0, got True$"),
    ((X, A, 1), dict(mode="max"), r"^mode: expected one of mean, sum, got 'max'$"),
    ((X, A, 1), dict(weights=A), r"^weights: expected float32, float16 or bfloat16, got torch\.int64$"),
    ((X, A, 1), dict(weights=W[:1]), r"^weights: expected \[2, 6\], got \(1, 6\)$"),
    ((X, A, 1), dict(weights=W.to("meta")), r"^weights: expected the device cpu, got meta$"),
]


@pytest.mark.parametrize("args, kwargs, message", ERRORS)
def test_error_text(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        merge_tokens(*args, **kwargs)
