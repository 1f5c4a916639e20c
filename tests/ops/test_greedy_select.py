"""greedy_select: both backends against slow float64 loops written from the formulas; then ties, degenerate input, error text."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from vlmprune import ops
from vlmprune.ops.greedy_select import greedy_select

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RULES = ["maxmin", "dpp", "coverage", "nms"]
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return greedy_select(*args, **kwargs)


def inputs(rule, relevance, threshold=0.1):
    """The keyword arguments that ``rule`` takes."""
    return {
        "relevance": None if rule == "maxmin" else relevance,
        "threshold": threshold if rule == "nms" else None,
    }


def make(B, N, D, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, N, D, generator=g) + 0.5  # mostly positive cosines
    return features.to(device, dtype), (torch.rand(B, N, generator=g) + 0.1).to(device)


def cosines(x):
    norms = [math.sqrt(sum(v * v for v in row)) for row in x]
    pairs = [
        [sum(a * b for a, b in zip(x[i], x[j], strict=True)) for j in range(len(x))] for i in range(len(x))
    ]
    ok = [0 < n < math.inf for n in norms]
    return [
        [pairs[i][j] / norms[i] / norms[j] if ok[i] and ok[j] else 0.0 for j in range(len(x))]
        for i in range(len(x))
    ]


def value_of(rule, cos, relevance, chosen, real, j):
    """What choosing ``j`` next is worth, from the definition, with nothing carried from step to step."""
    if rule == "maxmin":
        among = chosen or [i for i in real if i != j]
        return min((1 - cos[i][j] for i in among), default=math.inf)
    if rule == "dpp":
        items = [*chosen, j]
        kernel = [[relevance[a] * cos[a][b] * relevance[b] for b in items] for a in items]
        return torch.tensor(kernel, dtype=torch.float64).det().item()
    covered = [max([0.0] + [cos[i][c] for c in chosen]) for i in real]
    return relevance[j] * sum(max(0.0, cos[i][j] - c) for i, c in zip(real, covered, strict=True))


def by_definition(x, keep, rule, relevance, threshold, real):
    """Positions of one sample in the order of choice."""
    cos = cosines(x)
    if rule == "nms":
        ranked = sorted(real, key=lambda i: (-relevance[i], i))
        passed = []
        for i in ranked:
            if all(cos[i][j] <= threshold for j in passed):
                passed.append(i)
        return (passed + [i for i in ranked if i not in passed])[:keep]
    chosen = []
    while len(chosen) < min(keep, len(real)):
        left = [i for i in real if i not in chosen]
        values = [value_of(rule, cos, relevance, chosen, real, j) for j in left]
        chosen.append(left[values.index(max(values))])
    return chosen


def assert_is(result, expected, keep):
    index, order = result
    assert index.dtype == order.dtype == torch.int64
    assert index.shape == order.shape == (len(expected), keep)
    assert order.tolist() == [chosen + [-1] * (keep - len(chosen)) for chosen in expected]
    assert index.tolist() == [sorted(chosen) + [-1] * (keep - len(chosen)) for chosen in expected]


def slow(features, keep, rule, relevance, threshold=0.1, mask=None):
    B, N, _ = features.shape
    real = [[n for n in range(N) if mask is None or mask[b, n]] for b in range(B)]
    r = relevance.double().tolist()
    x = features.double().tolist()
    return [by_definition(x[b], keep, rule, r[b], threshold, real[b]) for b in range(B)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "ragged"])
def test_is_the_definition(backend, rule, dtype, masked, device):
    features, relevance = make(2, 21, 19, dtype, device)
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(3)).to(device) > 0.4 if masked else None
    if masked:
        mask[1, 5:] = False  # fewer real tokens than are kept
        features = features.masked_fill(~mask[..., None], math.nan)
        relevance = relevance.masked_fill(~mask, math.inf)
    expected = slow(features, 8, rule, relevance, mask=mask)
    kwargs = inputs(rule, relevance)
    assert_is(run(backend, features, 8, rule, mask=mask, **kwargs), expected, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nms_fills_up_with_the_most_relevant_it_skipped(backend, device):
    features, relevance = make(1, 20, 6, device=device)
    expected = slow(features, 20, "nms", relevance, 0.3)
    ranked = relevance[0].argsort(descending=True).tolist()
    assert expected[0] != ranked, "nothing was skipped"
    assert_is(run(backend, features, 20, "nms", relevance=relevance, threshold=0.3), expected, 20)
    everything = run(backend, features, 20, "nms", relevance=relevance, threshold=1.0)
    assert everything[1][0].tolist() == ranked  # no cosine exceeds 1, not even of a token with its double


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("B, N, D, keep", [(1, 150, 70, 8), (2, 65, 130, 5), (1, 30, 64, 30)])
def test_triton_equals_reference_over_tiles(rule, B, N, D, keep, device, monkeypatch):
    from vlmprune.triton_kernels import greedy_select as kernels

    monkeypatch.setattr(kernels, "MAX_CHUNK", 128)
    features, relevance = make(B, N, D, device=device, seed=N)
    kwargs = inputs(rule, relevance)
    for out, expected in zip(
        run("triton", features, keep, rule, **kwargs),
        run("reference", features, keep, rule, **kwargs),
        strict=True,
    ):
        assert torch.equal(out, expected)


@pytest.mark.parametrize("rule", ["maxmin", "dpp", "coverage"])
def test_triton_ties_go_to_the_lower_tile(rule, device, monkeypatch):
    from vlmprune.triton_kernels import greedy_select as kernels

    monkeypatch.setattr(kernels, "MAX_CHUNK", 128)
    features = torch.eye(3, device=device)[torch.arange(150, device=device) // 2 % 3][None]
    relevance = torch.ones(1, 150, device=device)
    kwargs = inputs(rule, relevance)
    assert run("triton", features, 5, rule, **kwargs)[1].tolist() == [[0, 2, 4, 1, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold, second", [(0.5, 1), (0.499, 2)])
def test_nms_lets_a_cosine_equal_to_the_threshold_pass(backend, threshold, second, device):
    features = torch.tensor([[[2.0, 0, 0, 0], [1, 1, 1, 1], [-1, 0, 0, 0]]], device=device)  # cosine 1/2
    relevance = torch.tensor([[3.0, 2.0, 1.0]], device=device)
    order = run(backend, features, 2, "nms", relevance=relevance, threshold=threshold)[1]
    assert order.tolist() == [[0, second]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosines_are_symmetric_to_the_bit(dtype, device):
    """Of two tokens nearest to each other the lower position must win, whichever of the two asks."""
    from vlmprune.ops.reference_sets import cosine
    from vlmprune.triton_kernels.pairwise_cosine import pairwise_cosine

    features, _ = make(1, 150, 100, dtype, device)
    for cos in (cosine(features, None), pairwise_cosine(features, None)[0]):
        assert torch.equal(cos, cos.mT)
        assert torch.equal(cos.diagonal(dim1=1, dim2=2), torch.ones(1, 150, device=device))
        assert cos.abs().max() <= 1


axis = st.integers(-1, 3)  # -1 = the zero vector
share = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@quick
@given(tokens=st.lists(st.tuples(axis, share, st.booleans()), min_size=1, max_size=10), data=st.data())
def test_exact_ties_go_to_the_lower_position(backend, rule, device, tokens, data):
    """Axes and halves of one: every sum is exact, so doubles, ties and spent ranks are too."""
    keep = data.draw(st.integers(0, len(tokens)))
    x = [[float(a == d) for d in range(4)] for a, _, _ in tokens]
    relevance, real = [r for _, r, _ in tokens], [i for i, (_, _, ok) in enumerate(tokens) if ok]
    expected = by_definition(x, keep, rule, relevance, 0.5, real)
    mask = torch.tensor([[ok for _, _, ok in tokens]], device=device)
    kwargs = inputs(rule, torch.tensor([relevance], device=device), 0.5)
    features = torch.tensor([x], device=device)
    assert_is(run(backend, features, keep, rule, mask=mask, **kwargs), [expected], keep)


def assert_distinct(result, N, keep):
    index, order = (t.tolist() for t in result)
    for positions, chosen in zip(index, order, strict=True):
        assert len(set(chosen)) == keep and all(0 <= n < N for n in chosen)
        assert positions == sorted(chosen)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "kind", ["doubles", "few doubles", "zeros", "opposite", "nan", "inf", "tiny", "huge"]
)
def test_degenerate_features_still_give_distinct_tokens(backend, rule, kind, device):
    features, relevance = make(1, 17, 12, device=device)
    if kind == "doubles":
        features = features[:, :1].expand(-1, 17, -1)
    elif kind == "few doubles":
        features = features[:, [n % 3 for n in range(17)]]
    elif kind == "zeros":
        features = torch.zeros_like(features)
    elif kind == "opposite":
        features = features[:, :1] * torch.tensor([1.0, -1.0] * 8 + [1.0], device=device)[:, None]
    elif kind in ("nan", "inf"):
        features[:, ::2, 3] = float(kind)
    else:
        features = features * {"tiny": 1e-30, "huge": 1e30}[kind]
    assert_distinct(run(backend, features, 17, rule, **inputs(rule, relevance)), 17, 17)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dpp_takes_the_lower_position_once_the_rank_is_spent(backend, device):
    g = torch.Generator().manual_seed(0)
    features = (torch.randn(1, 14, 3, generator=g) @ torch.randn(3, 40, generator=g)).to(device)
    order = run(backend, features, 14, "dpp", relevance=torch.ones(1, 14, device=device))[1][0].tolist()
    assert order[3:] == sorted(order[3:])
    assert order[:3] == slow(features, 3, "dpp", torch.ones(1, 14))[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["dpp", "coverage"])
def test_relevance_that_is_not_finite_counts_as_zero(backend, rule, device):
    features, relevance = make(1, 12, 20, device=device)
    relevance[0, [2, 5, 7]] = torch.tensor([math.nan, math.inf, -math.inf], device=device)
    zeroed = relevance.nan_to_num(0.0, 0.0, 0.0)
    result = run(backend, features, 12, rule, relevance=relevance)
    assert all(map(torch.equal, result, run(backend, features, 12, rule, relevance=zeroed)))
    assert result[1][0, -3:].tolist() == [2, 5, 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_coverage_takes_negative_relevance_as_zero_and_none_as_ones(backend, device):
    features, relevance = make(1, 12, 8, device=device)
    negative = relevance.index_fill(1, torch.tensor([1, 4], device=device), -2.0)
    result = run(backend, features, 12, "coverage", relevance=negative)
    assert all(map(torch.equal, result, run(backend, features, 12, "coverage", relevance=negative.clamp(0))))
    ones = run(backend, features, 12, "coverage", relevance=torch.ones_like(relevance))
    assert all(map(torch.equal, run(backend, features, 12, "coverage"), ones))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nms_ranks_infinities_as_they_are_and_nan_as_minus_infinity(backend, device):
    features = torch.eye(7, device=device)[None]
    relevance = torch.tensor([[math.nan, -math.inf, -3e38, 0.0, -0.0, math.inf, math.nan]], device=device)
    order = run(backend, features, 7, "nms", relevance=relevance, threshold=0.5)[1]
    assert order.tolist() == [[5, 3, 4, 2, 0, 1, 6]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("B, N, keep", [(0, 5, 2), (2, 0, 0), (2, 5, 0), (2, 1, 1), (0, 0, 0)])
def test_empty_and_single(backend, rule, B, N, keep, device):
    features, relevance = make(B, N, 4, device=device)
    expected = [list(range(keep))] * B
    assert_is(run(backend, features, keep, rule, **inputs(rule, relevance)), expected, keep)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_all_padding_keeps_nothing(backend, rule, device):
    features, relevance = make(2, 6, 4, device=device)
    mask = torch.tensor([[False] * 6, [False, True] + [False] * 4], device=device)
    kwargs = inputs(rule, relevance)
    assert_is(run(backend, features, 3, rule, mask=mask, **kwargs), [[], [1]], 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_strides_repeats_and_batches_change_nothing(backend, rule, device):
    wide, relevance = make(3, 26, 40, device=device)
    features, mask = wide[:, ::2, 5:29], (relevance > 0.3)[:, ::2]
    relevance = torch.stack([relevance[:, ::2]] * 2, dim=2)[..., 0]
    assert not any(t.is_contiguous() for t in (features, relevance, mask))
    kwargs = inputs(rule, relevance)
    result = run(backend, features, 6, rule, mask=mask, **kwargs)
    assert all(map(torch.equal, result, run(backend, features, 6, rule, mask=mask, **kwargs)))
    packed = {name: t.contiguous() if torch.is_tensor(t) else t for name, t in kwargs.items()}
    again = run(backend, features.contiguous(), 6, rule, mask=mask.contiguous(), **packed)
    assert all(map(torch.equal, result, again))
    alone = {name: t[1:2] if torch.is_tensor(t) else t for name, t in kwargs.items()}
    one = run(backend, features[1:2], 6, rule, mask=mask[1:2], **alone)
    assert all(torch.equal(a[1:2], b) for a, b in zip(result, one, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_schema_and_fake_agree(rule, device):
    features, relevance = make(2, 7, 5, device=device)
    mask = relevance > 0.2
    args = (features, 3, rule, None if rule == "maxmin" else relevance, 0.5, mask)
    opcheck(torch.ops.vlmprune.greedy_select.default, args)


def test_compiles_without_graph_breaks(device):
    features, relevance = make(2, 9, 5, device=device)

    def select(features, relevance):
        index, order = greedy_select(features, 4, "dpp", relevance=relevance)
        return index + order

    compiled = torch.compile(select, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(features, relevance), select(features, relevance))


X, R, M = torch.zeros(2, 6, 4), torch.zeros(2, 6), torch.ones(2, 6, dtype=torch.bool)
ERRORS = [
    ((X[0], 1), {}, r"^features: expected rank 3 \[B, N, D\], got \(6, 4\)$"),
    ((X.double(), 1), {}, r"^features: expected float32, float16 or bfloat16, got torch\.float64$"),
    ((X.mT, 1), {}, r"^features: expected a contiguous last dim, got strides \(24, 1, 4\)$"),
    ((X, 7), {}, r"^keep: expected a whole number in 0\.\.6, got 7$"),
    ((X, 0.5), {}, r"^keep: expected a whole number in 0\.\.6, got 0\.5$"),
    ((X, 1, "best"), {}, r"^rule: expected one of maxmin, dpp, coverage, nms, got 'best'$"),
    ((X, 1, "dpp"), {}, r"^relevance: expected \[2, 6\] with rule 'dpp', got None$"),
    ((X, 1, "nms"), dict(threshold=0.5), r"^relevance: expected \[2, 6\] with rule 'nms', got None$"),
    ((X, 1), dict(relevance=R), r"^relevance: expected None with rule 'maxmin', got a tensor$"),
    (
        (X, 1, "dpp"),
        dict(relevance=M),
        r"^relevance: expected float32, float16 or bfloat16, got torch\.bool$",
    ),
    ((X, 1, "coverage"), dict(relevance=R[:1]), r"^relevance: expected \[2, 6\], got \(1, 6\)$"),
    ((X, 1, "dpp"), dict(relevance=R.to("meta")), r"^relevance: expected the device cpu, got meta$"),
    ((X, 1, "nms"), dict(relevance=R), r"^threshold: expected a number with rule 'nms', got None$"),
    (
        (X, 1, "nms"),
        dict(relevance=R, threshold=math.nan),
        r"^threshold: expected a number with rule 'nms', got nan$",
    ),
    (
        (X, 1, "nms"),
        dict(relevance=R, threshold=True),
        r"^threshold: expected a number with rule 'nms', got True$",
    ),
    ((X, 1), dict(threshold=0.5), r"^threshold: expected None with rule 'maxmin', got 0\.5$"),
    ((X, 1), dict(mask=R), r"^mask: expected bool, got torch\.float32$"),
    ((X, 1), dict(mask=M[:, :5]), r"^mask: expected \[2, 6\], got \(2, 5\)$"),
    ((X, 1), dict(mask=M.to("meta")), r"^mask: expected the device cpu, got meta$"),
]


@pytest.mark.parametrize("args, kwargs, message", ERRORS)
def test_error_text(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        greedy_select(*args, **kwargs)


@pytest.mark.parametrize("N", [30, 67, 131, 333])
def test_dpp_chooses_the_first_of_doubles(N, device):
    """Of tokens that are alike in every bit the lower position is chosen first, at any place of a vector register."""
    g = torch.Generator().manual_seed(N)
    of = torch.randint(0, N // 2, (N,), generator=g)
    features, relevance = torch.randn(1, N, 16, generator=g)[:, of], torch.rand(1, N, generator=g)[:, of]
    given = features.to(device), N // 3, "dpp"
    order = run("reference", *given, relevance=relevance.to(device))[1][0].tolist()
    first = {token: of.tolist().index(token) for token in set(of.tolist())}
    independent = order[:16]  # then all are spanned, and tie at zero
    assert independent == [first[of[place].item()] for place in independent]
