"""cluster_dpc: both backends against slow float64 loops; then ties, far tokens, padding and error text."""

import math

import pytest
import torch
from torch.library import opcheck

from vlmprune import ops
from vlmprune.ops.cluster_dpc import cluster_dpc

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return cluster_dpc(*args, **kwargs)


def make(B, N, D, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def blobs(N, groups, D=20, device="cpu", seed=0):
    """N tokens around well separated group centres, and each token's group."""
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (N,), generator=g)
    group[:groups] = torch.arange(groups)
    x = 10 * torch.randn(groups, D, generator=g)[group] + torch.rand(N, D, generator=g)
    return x[None].to(device), group


def by_definition(x, clusters, k, real):
    """(assignment, centres) of one sample: ``x`` lists its tokens, ``real`` the positions that are no padding."""
    D = len(x[0])
    distance = {
        (i, j): math.sqrt(sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True))) / math.sqrt(D)
        for i in real
        for j in real
    }
    density = {}
    for i in real:
        nearest = sorted(distance[i, j] ** 2 for j in real)[:k]
        density[i] = math.exp(-sum(nearest) / len(nearest))
    product = {}
    for i in real:
        denser = [j for j in real if (density[j], -j) > (density[i], -i)]
        gap = min(distance[i, j] for j in denser) if denser else max(distance.values())
        product[i] = density[i] * gap
    centers = sorted(real, key=lambda i: (-product[i], i))[:clusters]
    assignment = [-1] * len(x)
    for i in real:
        assignment[i] = min(range(len(centers)), key=lambda c: (distance[i, centers[c]], c), default=-1)
    for number, center in enumerate(centers):
        assignment[center] = number
    return assignment, centers


def assert_is(result, expected, clusters):
    assignment, centers = result
    assert assignment.dtype == centers.dtype == torch.int64
    assert assignment.tolist() == [numbers for numbers, _ in expected]
    assert centers.tolist() == [found + [-1] * (clusters - len(found)) for _, found in expected]


def slow(features, clusters, k, mask=None):
    B, N, _ = features.shape
    real = [[n for n in range(N) if mask is None or mask[b, n]] for b in range(B)]
    return [by_definition(features[b].double().tolist(), clusters, k, real[b]) for b in range(B)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, neighbors",
    [(torch.float32, n) for n in (None, 1, 3, 19)] + [(torch.float16, 3), (torch.bfloat16, 3)],
)
def test_is_the_definition(backend, dtype, neighbors, device):
    features = make(1, 19, 13, dtype, device)
    expected = slow(features, 5, 5 if neighbors is None else neighbors)
    assert_is(run(backend, features, 5, neighbors=neighbors), expected, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbors", [None, 4])
def test_padding_is_nobodys_neighbour(backend, neighbors, device):
    features = make(3, 14, 9, device=device)
    mask = torch.rand(3, 14, generator=torch.Generator().manual_seed(1)).to(device) > 0.3
    mask[1], mask[2] = False, torch.arange(14, device=device) < 3  # none, and fewer than clusters
    expected = slow(features, 4, 4, mask)
    features = features.masked_fill(~mask[..., None], math.nan)
    assert_is(run(backend, features, 4, neighbors=neighbors, mask=mask), expected, 4)
    assert expected[1] == ([-1] * 14, []) and len(expected[2][1]) == 3


@pytest.mark.parametrize("N, D, clusters", [(40, 140, 9), (17, 128, 17)])
def test_triton_equals_reference_over_tiles(N, D, clusters, device, monkeypatch):
    from vlmprune.triton_kernels import cluster_dpc as kernels

    monkeypatch.setattr(kernels, "CHUNK", 16)
    features = make(1, N, D, torch.float16, device)
    results = run("triton", features, clusters), run("reference", features, clusters)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_finds_groups_and_numbers_them_by_their_centres(backend, device):
    features, group = blobs(30, 4, device=device)
    assignment, centers = (t[0].cpu() for t in run(backend, features, 4, neighbors=5))
    assert sorted(group[centers].tolist()) == [0, 1, 2, 3]
    assert torch.equal(group[centers][assignment], group)
    assert torch.equal(assignment[centers], torch.arange(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_tokens_do_not_all_have_density_zero(backend, device):
    """exp(-spread) is 0 in float32 for every token here; the order of density * gap must survive."""
    features = 5 * make(1, 15, 8, device=device)
    expected = slow(features, 4, 8)
    assert_is(run(backend, features, 4, neighbors=8), expected, 4)
    features = 100 * make(1, 15, 8, device=device)  # far beyond float64's exp, too
    centers = run(backend, features, 4, neighbors=8)[1][0].tolist()
    distance = torch.cdist(features[0].double(), features[0].double()) / 8**0.5
    spread = distance.sort(1).values[:, :8].square().mean(1)
    assert centers != sorted(centers)
    assert spread[centers[0]] == spread.min()  # the densest also has the largest gap


@pytest.mark.parametrize("backend", BACKENDS)
def test_doubles_tie_to_the_lower_position_and_centre_themselves(backend, device):
    same = torch.full((1, 6, 4), 0.5, device=device)
    assert_is(run(backend, same, 3), [([0, 1, 2, 0, 0, 0], [0, 1, 2])], 3)
    line = torch.tensor([[[0.0], [8.0], [0.0], [8.0], [0.0]]], device=device)
    assert_is(run(backend, line, 2, neighbors=2), [([0, 1, 0, 1, 0], [0, 1])], 2)
    assert_is(run(backend, line, 5, neighbors=2), [([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])], 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_distances_each_count_as_a_neighbour(backend, seed, device):
    """Quarters on a line: distances and their sums are exact, and many tie at the k-th."""
    g = torch.Generator().manual_seed(seed)
    features = (torch.randint(13, (2, 14, 1), generator=g) / 4).to(device)
    assert_is(run(backend, features, 4, neighbors=5), slow(features, 4, 5), 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, N, clusters", [(0, 4, 2), (2, 0, 0), (2, 4, 0), (2, 1, 1)])
def test_empty_and_single(backend, B, N, clusters, device):
    expected = [([0] * N if clusters else [-1] * N, [0] * clusters)] * B
    assert_is(run(backend, make(B, N, 3, device=device), clusters), expected, clusters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_repeats_and_batches_change_nothing(backend, device):
    features = make(2, 18, 30, device=device)[:, ::2, 4:20]
    mask = (torch.arange(18, device=device).expand(2, -1) != 6)[:, ::2]
    result = run(backend, features, 3, mask=mask)
    assert all(map(torch.equal, result, run(backend, features, 3, mask=mask)))
    packed = run(backend, features.contiguous(), 3, mask=mask.contiguous())
    assert all(map(torch.equal, result, packed))
    one = run(backend, features[1:], 3, mask=mask[1:])
    assert all(torch.equal(a[1:], b) for a, b in zip(result, one, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_schema_and_fake_agree(masked, device):
    mask = torch.ones(2, 7, dtype=torch.bool, device=device) if masked else None
    opcheck(torch.ops.vlmprune.cluster_dpc.default, (make(2, 7, 5, device=device), 3, 2, mask))


def test_compiles_without_graph_breaks(device):
    features = make(2, 9, 5, device=device)

    def cluster(features):
        assignment, centers = cluster_dpc(features, 3)
        return assignment.sum() + centers

    compiled = torch.compile(cluster, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(features), cluster(features))


X, M = torch.zeros(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
ERRORS = [
    ((X[0], 1), {}, r"^features: expected rank 3 \[B, N, D\], got \(6, 4\)$"),
    ((X.double(), 1), {}, r"^features: expected float32, float16 or bfloat16, got torch\.float64$"),
    ((X[..., :0], 1), {}, r"^features: expected at least one column, got \(2, 6, 0\)$"),
    ((X.mT, 1), {}, r"^features: expected a contiguous last dim, got strides \(24, 1, 4\)$"),
    ((X, 7), {}, r"^clusters: expected a whole number in 0\.\.6, got 7$"),
    ((X, 1.0), {}, r"^clusters: expected a whole number in 0\.\.6, got 1\.0$"),
    ((X, 1), dict(neighbors=7), r"^neighbors: expected a whole number in 0\.\.6, got 7$"),
    ((X, 1), dict(neighbors=0), r"^neighbors: expected at least 1, got 0$"),
    ((X, 1), dict(mask=M.int()), r"^mask: expected bool, got torch\.int32$"),
    ((X, 1), dict(mask=M[:1]), r"^mask: expected \[2, 6\], got \(1, 6\)$"),
    ((X, 1), dict(mask=M.to("meta")), r"^mask: expected the device cpu, got meta$"),
]


@pytest.mark.parametrize("args, kwargs, message", ERRORS)
def test_error_text(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cluster_dpc(*args, **kwargs)
