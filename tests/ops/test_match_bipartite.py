"""match_bipartite: both backends against slow float64 loops; then ties, odd tokens, padding, merging and error text."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from vlmprune import ops
from vlmprune.ops.match_bipartite import match_bipartite

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return match_bipartite(*args, **kwargs)


def make(B, N, D, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def cosine(x, y):
    norms = [math.sqrt(sum(v * v for v in row)) for row in (x, y)]
    if not all(0 < n < math.inf for n in norms):
        return 0.0
    return sum(a * b for a, b in zip(x, y, strict=True)) / norms[0] / norms[1]


def by_definition(x, r, destinations, real):
    """(assignment, survivors) of one sample: ``x`` lists its tokens, ``real`` the positions that are no padding."""
    takes = [n for n in sorted(destinations) if n in real]
    match, similarity = {}, {}
    for n in real:
        if n not in takes and takes:
            values = [cosine(x[n], x[d]) for d in takes]
            similarity[n] = max(values)
            match[n] = takes[values.index(similarity[n])]
    merged = sorted(match, key=lambda n: (-similarity[n], n))[:r]
    survivors = [n for n in sorted(real) if n not in merged]
    return [
        survivors.index(match[n] if n in merged else n) if n in real else -1 for n in range(len(x))
    ], survivors


def slow(features, r, destinations=None, mask=None):
    B, N, _ = features.shape
    rows = torch.arange(1, N, 2) if destinations is None else destinations.cpu()
    rows = rows.expand(B, -1).tolist()
    real = [[n for n in range(N) if mask is None or mask[b, n]] for b in range(B)]
    return [by_definition(features[b].double().tolist(), r, rows[b], real[b]) for b in range(B)]


def assert_is(result, expected, width):
    assignment, index = result
    assert assignment.dtype == index.dtype == torch.int64
    assert index.tolist() == [kept + [-1] * (width - len(kept)) for _, kept in expected]
    assert assignment.tolist() == [places for places, _ in expected]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, r", [(20, 7), (21, 11), (9, 0), (2, 1), (3, 1)])
def test_is_the_definition(backend, dtype, N, r, device):
    features = make(2, N, 17, dtype, device)
    assert_is(run(backend, features, r), slow(features, r), N - r)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_destinations_may_be_given_in_any_order(backend, per_sample, device):
    features = make(2, 24, 9, device=device)
    destinations = torch.tensor([[23, 4, 0, 11, 5, 7], [1, 2, 3, 22, 9, 8]], device=device)
    destinations = destinations if per_sample else destinations[0]
    expected = slow(features, 15, destinations)
    assert_is(run(backend, features, 15, destinations=destinations), expected, 9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given_destinations", [False, True])
def test_padding_is_neither_source_nor_destination(backend, given_destinations, device):
    """A sample with fewer sources than r, one with no destination, one with nothing."""
    features = make(5, 17, 9, device=device)
    mask = torch.rand(5, 17, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[1], mask[2], mask[3] = torch.arange(17) < 3, torch.arange(17) % 2 == 0, False
    mask = mask.to(device)
    destinations = torch.tensor([15, 1, 5, 9], device=device) if given_destinations else None
    r, width = (13, 13) if given_destinations else (9, 9)
    expected = slow(features, r, destinations, mask)
    assert max(len(kept) for _, kept in expected) == 9 and expected[3] == ([-1] * 17, [])
    features = features.masked_fill(~mask[..., None], math.nan)
    assert_is(run(backend, features, r, destinations=destinations, mask=mask), expected, width)


@pytest.mark.parametrize("N, D, r, M", [(300, 70, 100, None), (150, 130, 75, None), (200, 40, 140, 50)])
def test_triton_equals_reference_over_tiles(N, D, r, M, device, monkeypatch):
    """Many tiles, shares of the destinations with none, chunks of positions."""
    from vlmprune.triton_kernels import match_bipartite as kernels

    monkeypatch.setattr(kernels, "MAX_SPLITS", 2)
    config = {"KEYS": 64, "CHUNK": 64, "IN_REGISTERS": False, "num_warps": 4}
    monkeypatch.setattr(kernels, "select_tiles", lambda N, chunk: config)
    g = torch.Generator().manual_seed(1)
    destinations = None if M is None else torch.randperm(N, generator=g)[:M].to(device)
    features = make(2, N, D, torch.float16, device)
    results = [run(backend, features, r, destinations=destinations) for backend in BACKENDS]
    assert all(map(torch.equal, *results))


axis = st.integers(-1, 3)  # -1 = the zero vector


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(tokens=st.lists(st.tuples(axis, st.booleans()), min_size=1, max_size=12), data=st.data())
def test_exact_ties_go_to_the_lower_position(backend, device, tokens, data):
    """Axes: every cosine is 0 or 1."""
    N = len(tokens)
    x = [[float(a == d) for d in range(4)] for a, _ in tokens]
    destinations = data.draw(st.lists(st.integers(0, N - 1), unique=True, max_size=N))
    M = len(destinations)
    r = data.draw(st.integers(0, N - M if M else 0))
    masked = data.draw(st.booleans())
    real = [i for i, (_, ok) in enumerate(tokens) if ok or not masked]
    mask = torch.tensor([[ok for _, ok in tokens]], device=device) if masked else None
    at = torch.tensor(destinations, dtype=torch.int64, device=device)
    features = torch.tensor([x], device=device)
    result = run(backend, features, r, destinations=at, mask=mask)
    expected = by_definition(x, r, destinations, real)
    assert_is(result, [expected], N - (min(r, M) if masked else r))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zeros", "nan", "inf", "tiny", "huge"])
def test_tokens_without_a_direction_merge_last(backend, kind, device):
    features = make(1, 16, 8, device=device).abs()  # cosines above 0
    bad = [2, 3, 8]
    values = {"zeros": 0.0, "nan": math.nan, "inf": math.inf, "tiny": 1e-30, "huge": 1e30}
    features[:, bad] = values[kind] * torch.ones(8, device=device)
    assignment, index = run(backend, features, 6)
    assert index[0].tolist() == [1, 2, 3, 5, 7, 8, 9, 11, 13, 15]
    assert assignment[0, 4] != index[0].tolist().index(3)
    assert run(backend, features, 7)[1][0].tolist() == [1, 3, 5, 7, 8, 9, 11, 13, 15]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_tokens_merge_from_the_left_into_the_first(backend, device):
    same = make(1, 1, 8, device=device).expand(-1, 140, -1)
    survivors = [1, 3, 5, *range(6, 140)]
    places = [0, 0, 0, 1, 0, 2, *range(3, 137)]
    assert_is(run(backend, same, 3), [(places, survivors)], 137)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_tokens_takes_the_assignment(backend, device):
    """Twice, as ToMe does layer after layer: sizes weigh the second mean, so all rows count once."""
    features, sizes = make(2, 18, 6, device=device), torch.ones(2, 18, device=device)
    merged, weights = features, sizes
    for r in (7, 4):
        assignment, index = run(backend, merged, r)
        W = index.shape[1]
        merged = ops.merge_tokens(merged, assignment, W, weights=weights)
        weights = ops.merge_tokens(weights[..., None], assignment, W, mode="sum")[..., 0]
    assert merged.shape == (2, 7, 6) and weights.sum(1).tolist() == [18.0, 18.0]
    whole = (merged * weights[..., None]).sum(1) / 18
    torch.testing.assert_close(whole, features.mean(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_merges_at_r_0(backend, device):
    everything = list(range(7))
    assert_is(run(backend, make(2, 7, 3, device=device), 0), [(everything, everything)] * 2, 7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, N", [(0, 6), (2, 0), (2, 1)])
def test_empty_and_single(backend, B, N, device):
    alone = (list(range(N)), list(range(N)))
    assert_is(run(backend, make(B, N, 3, device=device), 0), [alone] * B, N)
    nowhere = torch.empty(0, dtype=torch.int64, device=device)
    assert_is(run(backend, make(B, N, 3, device=device), 0, destinations=nowhere), [alone] * B, N)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_repeats_and_batches_change_nothing(backend, device):
    features = make(3, 30, 40, device=device)[:, ::2, 5:29]
    mask = (torch.arange(30, device=device).expand(3, -1) != 6)[:, ::2]
    result = run(backend, features, 5, mask=mask)
    assert all(map(torch.equal, result, run(backend, features, 5, mask=mask)))
    assert all(map(torch.equal, result, run(backend, features.contiguous(), 5, mask=mask.contiguous())))
    one = run(backend, features[1:2], 5, mask=mask[1:2])
    assert all(torch.equal(a[1:2], b) for a, b in zip(result, one, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("M", [None, 2])
def test_schema_and_fake_agree(masked, M, device):
    mask = torch.ones(2, 7, dtype=torch.bool, device=device) if masked else None
    destinations = None if M is None else torch.arange(M, device=device)
    args = (make(2, 7, 5, device=device), 3, destinations, mask)
    opcheck(torch.ops.vlmprune.match_bipartite.default, args)


def test_compiles_without_graph_breaks(device):
    features = make(2, 9, 5, device=device)

    def match(features):
        assignment, index = match_bipartite(features, 3)
        return assignment.sum() + index

    compiled = torch.compile(match, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(features), match(features))


X, M, P = torch.zeros(2, 6, 4), torch.ones(2, 6, dtype=torch.bool), torch.tensor([0, 1])
ERRORS = [
    ((X[0], 1), {}, r"^features: expected rank 3 \[B, N, D\], got \(6, 4\)$"),
    ((X.double(), 1), {}, r"^features: expected float32, float16 or bfloat16, got torch\.float64$"),
    ((X.mT, 1), {}, r"^features: expected a contiguous last dim, got strides \(24, 1, 4\)$"),
    ((X, 4), {}, r"^r: expected a whole number in 0\.\.3, got 4$"),
    ((X, -1), {}, r"^r: expected a whole number in 0\.\.3, got -1$"),
    ((X, 1.0), {}, r"^r: expected a whole number in 0\.\.3, got 1\.0$"),
    ((X[:, :1], 1), {}, r"^r: expected a whole number in 0\.\.0, got 1$"),
    ((X, 5), dict(destinations=P), r"^r: expected a whole number in 0\.\.4, got 5$"),
    ((X, 1), dict(destinations=P[:0]), r"^r: expected a whole number in 0\.\.0, got 1$"),
    ((X, 1), dict(destinations=P.int()), r"^destinations: expected int64, got torch\.int32$"),
    ((X, 1), dict(destinations=P[None]), r"^destinations: expected \[M\] or \[2, M\], got \(1, 2\)$"),
    ((X, 1), dict(destinations=P.repeat(4)), r"^destinations: expected at most 6 positions, got \(8,\)$"),
    ((X, 1), dict(destinations=P.to("meta")), r"^destinations: expected the device cpu, got meta$"),
    ((X, 1), dict(destinations=P + 5), r"^destinations: expected positions in 0\.\.5, got \[5, 6\]$"),
    ((X, 1), dict(destinations=P - 1), r"^destinations: expected positions in 0\.\.5, got \[-1, 0\]$"),
    ((X, 1), dict(destinations=P * 0), r"^destinations: expected distinct positions, got \[0, 0\]$"),
    ((X, 1), dict(mask=M.int()), r"^mask: expected bool, got torch\.int32$"),
    ((X, 1), dict(mask=M[:1]), r"^mask: expected \[2, 6\], got \(1, 6\)$"),
    ((X, 1), dict(mask=M.to("meta")), r"^mask: expected the device cpu, got meta$"),
]


@pytest.mark.parametrize("args, kwargs, message", ERRORS)
def test_error_text(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        match_bipartite(*args, **kwargs)
