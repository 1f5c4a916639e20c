"""select_topk: both backends against Python's sort, over every awkward float, tie, code and quota; then error text."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from vlmprune import ops

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

special = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, math.inf, -math.inf, math.nan, 65504.0, 3e38, -3e38]
)
row = st.lists(special | st.floats(width=16) | st.integers(-3, 3).map(float), min_size=1, max_size=40)


def run(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return ops.select_topk(*args, **kwargs)


def by_definition(scores, keep, code=None):
    """Kept positions of one row: every code 1, and the best ``keep`` of code 0, NaN last, ties to the lower position."""
    code = [0] * len(scores) if code is None else code
    competing = [i for i, c in enumerate(code) if c == 0]
    ranked = sorted(
        competing, key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i], i)
    )
    return sorted(ranked[: max(keep, 0)] + [i for i, c in enumerate(code) if c == 1])


def assert_is(result, expected, width):
    index, count = result
    assert index.dtype == torch.int64 and count.dtype == torch.int64
    assert index.shape == (len(expected), width)
    assert count.tolist() == [len(kept) for kept in expected]
    assert index.tolist() == [kept + [-1] * (width - len(kept)) for kept in expected]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(scores=row, data=st.data())
def test_int_keep_is_the_definition(backend, dtype, device, scores, data):
    keep = data.draw(st.integers(0, len(scores)))
    x = torch.tensor([scores], device=device).to(dtype)
    assert_is(run(backend, x, keep), [by_definition(x[0].tolist(), keep)], keep)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(rows=st.lists(row, min_size=1, max_size=3), data=st.data())
def test_codes_and_quotas_are_the_definition(backend, device, rows, data):
    N = max(map(len, rows))
    rows = [r + [math.nan] * (N - len(r)) for r in rows]
    codes = [data.draw(st.lists(st.integers(0, 2), min_size=N, max_size=N)) for _ in rows]
    quotas = [data.draw(st.integers(-2, N + 2)) for _ in rows]
    code = torch.tensor(codes, dtype=torch.int8, device=device)
    x, keep = torch.tensor(rows, device=device), torch.tensor(quotas, device=device)
    expected = [by_definition(r, q, c) for r, q, c in zip(x.tolist(), quotas, codes, strict=True)]
    assert_is(run(backend, x, keep, code=code), expected, N)


@pytest.mark.parametrize("N", [1, 127, 129, 1000, 4096, 4097, 6001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_equals_reference_over_chunks(N, dtype, device):
    g = torch.Generator().manual_seed(N)
    scores = (torch.randn(2, N, generator=g) * 4).round().to(dtype).to(device)  # many ties
    scores[:, ::7], scores[:, ::11], scores[:, ::13] = math.nan, -math.inf, -0.0
    keep = torch.tensor([N // 3, N + 5], device=device)
    code = torch.randint(0, 3, (2, N), generator=g, dtype=torch.int8).to(device)
    for args in [(scores, N // 2, None), (scores, keep, None), (scores, keep, code), (scores, N // 9, code)]:
        for out, expected in zip(
            run("triton", *args[:2], code=args[2]), run("reference", *args[:2], code=args[2]), strict=True
        ):
            assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_position(backend, device):
    assert run(backend, torch.zeros(1, 300, device=device), 7)[0].tolist() == [list(range(7))]
    signed = torch.tensor([[-0.0, 0.0, -0.0, 0.0]], device=device)
    assert run(backend, signed, 2)[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_any_bits_ranks_below_minus_infinity(backend, device):
    bits = torch.tensor([[0x7FC00000, -0x00400000, 0x7F800001, -0x00800000, -0x007FFFFF]], dtype=torch.int32)
    scores = bits.view(torch.float32).to(device)  # nan, -nan, signalling nan, -inf, -nan
    assert scores.isnan().tolist() == [[True, True, True, False, True]]
    assert run(backend, scores, 1)[0].tolist() == [[3]]
    assert run(backend, scores, 3)[0].tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, device):
    base = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(device)
    scores, code = base.T[:, ::2], torch.zeros(20, 6, dtype=torch.int8, device=device).T
    code[:, 3] = 1
    assert not scores.is_contiguous() and not code.is_contiguous()
    expected = run(backend, scores.contiguous(), 5, code=code.contiguous())
    assert all(map(torch.equal, run(backend, scores, 5, code=code), expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_and_does_not_depend_on_the_batch(backend, device):
    scores = torch.randint(0, 9, (3, 500), generator=torch.Generator().manual_seed(0)).float().to(device)
    index, _ = run(backend, scores, 100)
    assert torch.equal(run(backend, scores, 100)[0], index)
    assert torch.equal(run(backend, scores[1:2], 100)[0], index[1:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, N", [(0, 5), (2, 0), (0, 0)])
def test_empty(backend, B, N, device):
    scores = torch.zeros(B, N, device=device)
    assert_is(run(backend, scores, 0), [[]] * B, 0)
    assert_is(run(backend, scores, torch.full((B,), 3, device=device)), [list(range(min(3, N)))] * B, N)
    code = torch.ones(B, N, dtype=torch.int8, device=device)
    assert_is(run(backend, scores, 0, code=code), [list(range(N))] * B, N)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_may_require_grad(backend, device):
    scores = torch.randn(1, 9, device=device, requires_grad=True)
    index, count = run(backend, scores, 3)
    assert not index.requires_grad and not count.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "segments",
    [[12], [4, 4, 4], [1, 5, 0, 6], [12, 0], [2, 10]],
    ids=["one", "equal", "empty", "last", "two"],
)
@pytest.mark.parametrize("keep", [0, 3, 20])
def test_segments_keep_so_many_each(backend, segments, keep, device):
    scores = torch.randint(0, 5, (2, 12), generator=torch.Generator().manual_seed(1)).float().to(device)
    expected = []
    for values in scores.tolist():
        starts = [sum(segments[:i]) for i in range(len(segments))]
        parts = [values[s : s + n] for s, n in zip(starts, segments, strict=True)]
        kept = [[s + i for i in by_definition(p, keep)] for s, p in zip(starts, parts, strict=True)]
        expected.append([position for part in kept for position in part])
    assert_is(run(backend, scores, keep, segments=segments), expected, sum(min(keep, n) for n in segments))


def test_no_segments_of_nothing(device):
    assert_is(ops.select_topk(torch.zeros(2, 0, device=device), 3, segments=[]), [[], []], 0)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("coded", [True, False])
def test_schema_and_fake_agree(on_device, coded, device):
    quota = torch.tensor([2, 3], device=device) if on_device else None
    code = torch.zeros(2, 9, dtype=torch.int8, device=device) if coded else None
    opcheck(torch.ops.vlmprune.select_topk.default, (torch.randn(2, 9, device=device), 4, quota, code))


def test_compiles_without_graph_breaks(device):
    scores = torch.randn(2, 12, device=device)

    def select(scores):
        return ops.select_topk(scores, 2, segments=[6, 6])[0] + ops.select_topk(scores, 4)[0]

    compiled = torch.compile(select, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(scores), select(scores))


X = torch.zeros(2, 6)
ERRORS = [
    ((X[0], 1), {}, r"^scores: expected rank 2 \[B, N\], got \(6,\)$"),
    ((X.double(), 1), {}, r"^scores: expected float32, float16 or bfloat16, got torch\.float64$"),
    ((X, 7), {}, r"^keep: expected a whole number in 0\.\.6, got 7$"),
    ((X, -1), {}, r"^keep: expected a whole number in 0\.\.6, got -1$"),
    ((X, 0.5), {}, r"^keep: expected a whole number in 0\.\.6, got 0\.5$"),
    ((X, True), {}, r"^keep: expected a whole number in 0\.\.6, got True$"),
    ((X, torch.tensor([1, 2]).int()), {}, r"^keep: expected int64, got torch\.int32$"),
    ((X, torch.tensor([1])), {}, r"^keep: expected \[2\], got \(1,\)$"),
    ((X, torch.tensor([1, 2], device="meta")), {}, r"^keep: expected the device cpu, got meta$"),
    ((X, 1), dict(code=X), r"^code: expected int8, got torch\.float32$"),
    ((X, 1), dict(code=X[:1].to(torch.int8)), r"^code: expected \[2, 6\], got \(1, 6\)$"),
    ((X, 1), dict(code=X.to(torch.int8), segments=[6]), r"^code: expected None with segments, got a tensor$"),
    ((X, torch.tensor([1, 2])), dict(segments=[6]), r"^keep: expected an int with segments, got a tensor$"),
    ((X, -1), dict(segments=[6]), r"^keep: expected a whole number >= 0, got -1$"),
    ((X, 1), dict(segments=[3, 2]), r"^segments: expected lengths >= 0 that add up to 6, got \[3, 2\]$"),
    ((X, 1), dict(segments=[8, -2]), r"^segments: expected lengths >= 0 that add up to 6, got \[8, -2\]$"),
]


@pytest.mark.parametrize("args, kwargs, message", ERRORS)
def test_error_text(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.select_topk(*args, **kwargs)
