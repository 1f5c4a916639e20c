"""select_topk: both backends against Python's sort, over every awkward float, tie, code and quota; then error text."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from helpers import select_cases
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


def by_definition(scores, keep, code=None, threshold=None):
    """Kept positions of one row: every code 1, and the best ``keep`` of code 0, NaN last, ties to the lower position."""
    code = [0] * len(scores) if code is None else code
    competing = [i for i, c in enumerate(code) if c == 0 and (threshold is None or scores[i] >= threshold)]
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
@settings(quick, max_examples=60)
@given(scores=row, dtype=st.sampled_from(DTYPES), data=st.data())
def test_int_keep_is_the_definition(backend, device, scores, dtype, data):
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


@pytest.mark.parametrize("backend", BACKENDS)
@settings(quick, max_examples=60)
@given(rows=st.lists(row, min_size=1, max_size=3), dtype=st.sampled_from(DTYPES), data=st.data())
def test_thresholds_are_the_definition(backend, device, rows, dtype, data):
    """One for all rows or one a row; with and without codes; with no cap, one cap, or one a row."""
    N = max(map(len, rows))
    x = torch.tensor([r + [0.5] * (N - len(r)) for r in rows], device=device).to(dtype)
    least = [data.draw(special | st.sampled_from(x.flatten().tolist())) for _ in rows]
    codes = [data.draw(st.lists(st.integers(0, 2), min_size=N, max_size=N)) for _ in rows]
    quotas = [data.draw(st.integers(-2, N + 2)) for _ in rows]
    code = torch.tensor(codes, dtype=torch.int8, device=device) if data.draw(st.booleans()) else None
    codes = codes if code is not None else [None] * len(rows)
    threshold = torch.tensor(least, device=device)
    cap = data.draw(st.sampled_from([None, min(2, N), "a row"]))
    if cap == "a row":
        keep, width = torch.tensor(quotas, device=device), N
    else:
        keep, quotas = cap, [N if cap is None else cap] * len(rows)
        width = N if cap is None or code is not None else cap
    expected = map(by_definition, x.tolist(), quotas, codes, threshold.tolist())
    assert_is(run(backend, x, keep, code=code, threshold=threshold), list(expected), width)
    if not math.isnan(least[0]):
        expected = map(by_definition, x.tolist(), quotas, codes, [threshold[0].item()] * len(rows))
        assert_is(run(backend, x, keep, code=code, threshold=least[0]), list(expected), width)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_reaches_nan_and_nan_reaches_nothing(backend, device):
    scores = torch.tensor([[math.nan, -math.inf, 0.0, math.inf]] * 3, device=device)
    threshold = torch.tensor([math.nan, -math.inf, math.inf], device=device)
    assert_is(run(backend, scores, threshold=threshold), [[], [1, 2, 3], [3]], 4)
    forced = torch.tensor([[1, 2, 0, 0]] * 3, dtype=torch.int8, device=device)
    assert_is(run(backend, scores, threshold=threshold, code=forced), [[0], [0, 2, 3], [0, 3]], 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_numbers_like_others(backend, dtype, device):
    """Neither flushed to zero nor out of order."""
    step = torch.tensor([1], dtype=torch.int16).view(torch.float16).item()
    step = step if dtype == torch.float16 else 1e-40
    scores = torch.tensor([[0.0, step, -step, 2 * step, 0.0, 3 * step]], device=device).to(dtype)
    assert scores[0, 1] > 0
    assert run(backend, scores, 2)[0].tolist() == [[3, 5]]
    assert run(backend, scores, 4)[0].tolist() == [[0, 1, 3, 5]]
    assert_is(run(backend, scores, threshold=scores[0, 1].item()), [[1, 3, 5]], 6)
    assert_is(run(backend, scores, threshold=-0.0), [[0, 1, 3, 4, 5]], 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.25, -0.0, math.inf, -math.inf, math.nan, 1e-40])
def test_equal_scores_fill_up_from_the_left(backend, value, device):
    scores = torch.full((1, 130), value, device=device)
    for keep in (0, 1, 129, 130):
        assert_is(run(backend, scores, keep), [list(range(keep))], keep)
    reached = [] if math.isnan(value) else list(range(130))
    assert_is(run(backend, scores, threshold=-math.inf), [reached], 130)
    assert_is(run(backend, scores, 3, threshold=-math.inf), [reached[:3]], 3)


@pytest.mark.parametrize("kind", ["random", "equal"])
@pytest.mark.parametrize("N", [65536, 70001])
def test_triton_equals_reference_in_very_long_rows(kind, N, device):
    g = torch.Generator().manual_seed(N)
    scores = (torch.randn(1, N, generator=g) if kind == "random" else torch.ones(1, N)).to(device)
    for keep, options in ((N // 5, {}), (N, {}), (N // 2, dict(threshold=0.5))):
        out, expected = (run(backend, scores, keep, **options) for backend in ("triton", "reference"))
        assert all(map(torch.equal, out, expected))


@pytest.mark.parametrize("keep", [1, 2, 70, 500, 998, 999])
def test_triton_equals_reference_where_scores_are_uneven(keep, device):
    """And hard to interpolate."""
    scores = select_cases.uneven(1000).to(device)
    out, want = (run(backend, scores, keep) for backend in ("triton", "reference"))
    assert all(map(torch.equal, out, want))


@pytest.mark.parametrize("N", [1, 127, 129, 1000, 4096, 4097, 6001, 16385])
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


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("coded", [True, False])
def test_schema_and_fake_agree(on_device, coded, device):
    quota = torch.tensor([2, 3], device=device) if on_device else None
    code = torch.zeros(2, 9, dtype=torch.int8, device=device) if coded else None
    scores = torch.randn(2, 9, device=device)
    opcheck(torch.ops.vlmprune.select_topk.default, (scores, 4, quota, code))
    opcheck(torch.ops.vlmprune.select_topk.default, (scores, 4, quota, code, 0.1))
    opcheck(torch.ops.vlmprune.select_topk.default, (scores, 4, quota, code, None, scores[:, 0].clone()))


def test_compiles_without_graph_breaks(device):
    scores = torch.randn(2, 12, device=device)

    def select(scores):
        above = ops.select_topk(scores, 4, threshold=0.0)[0]
        return ops.select_topk(scores, 2, segments=[5, 7])[0] + ops.select_topk(scores, 4)[0] + above

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
    (
        (X, torch.tensor([1, 2])),
        dict(segments=[6]),
        r"^keep: expected an int, or one a segment, got a tensor$",
    ),
    ((X,), {}, r"^keep: expected a whole number in 0\.\.6, got None$"),
    ((X, [1]), {}, r"^keep: expected a whole number in 0\.\.6, got \[1\]$"),
    ((X, 7), dict(threshold=0.5), r"^keep: expected a whole number in 0\.\.6, got 7$"),
    ((X,), dict(threshold=math.nan), r"^threshold: expected a number, got nan$"),
    ((X,), dict(threshold=True), r"^threshold: expected a number, got True$"),
    ((X,), dict(threshold="0.5"), r"^threshold: expected a number, got '0\.5'$"),
    ((X,), dict(threshold=X[:, 0].double()), r"^threshold: expected float32, got torch\.float64$"),
    ((X,), dict(threshold=X[0]), r"^threshold: expected \[2\], got \(6,\)$"),
    ((X,), dict(threshold=X[:, 0].to("meta")), r"^threshold: expected the device cpu, got meta$"),
]


@pytest.mark.parametrize("args, kwargs, message", ERRORS)
def test_error_text(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.select_topk(*args, **kwargs)
