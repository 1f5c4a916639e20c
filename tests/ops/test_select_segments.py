"""select_topk with segments: both backends against Python's sort, segment by segment; then error text."""

import math

import pytest
import torch
from torch.library import opcheck

from vlmprune import ops

BACKENDS = ["reference", "triton"]


def run(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return ops.select_topk(*args, **kwargs)


def by_definition(scores, keep):
    """Positions of the ``keep`` best of one segment, NaN last, ties to the lower position."""
    nan = [math.isnan(x) for x in scores]
    ranked = sorted(range(len(scores)), key=lambda i: (nan[i], 0.0 if nan[i] else -scores[i], i))
    return sorted(ranked[:keep])


def assert_is(result, expected, width):
    index, count = result
    assert index.dtype == torch.int64 and count.dtype == torch.int64
    assert index.shape == (len(expected), width)
    assert count.tolist() == [width] * len(expected)
    assert index.tolist() == expected


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, more", [(torch.float32, 70), (torch.float16, 5), (torch.bfloat16, 5)])
def test_each_segment_may_have_its_own_quota(backend, dtype, more, device):
    """More segments than one launch takes; any strides; awkward scores; lengths of none and one."""
    g = torch.Generator().manual_seed(4)
    segments = [5, 0, 1, 9, 130, 2, *torch.randint(0, 6, (more,), generator=g).tolist()]
    keep = torch.randint(0, 6, (len(segments),), generator=g).tolist()
    N = sum(segments)
    scores = (torch.randn(2 * N, 2, generator=g) * 2).round().to(device, dtype).t()[:, ::2]
    scores[:, ::5], scores[:, ::7] = math.nan, -math.inf
    parts = [row.split(segments) for row in scores]
    expected = [
        [
            sum(segments[:i]) + n
            for i, part in enumerate(row)
            for n in by_definition(part.tolist(), min(keep[i], segments[i]))
        ]
        for row in parts
    ]
    width = sum(map(min, keep, segments))
    assert_is(run(backend, scores, keep, segments=segments), expected, width)


def test_triton_equals_reference_in_long_segments(device):
    scores = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0)).to(device)
    for segments in ([4096, 4904], [1, 8998, 1]):
        out, expected = (run(backend, scores, 300, segments=segments) for backend in ("triton", "reference"))
        assert all(map(torch.equal, out, expected))


def test_no_segments_of_nothing(device):
    assert_is(ops.select_topk(torch.zeros(2, 0, device=device), 3, segments=[]), [[], []], 0)


@pytest.mark.parametrize("segments, quotas", [([9], [2]), ([4, 0, 5], [2, 0, 5]), ([9, 0], [0, 0])])
def test_schema_and_fake_of_segments_agree(segments, quotas, device):
    opcheck(torch.ops.vlmprune.select_segments.default, (torch.randn(2, 9, device=device), segments, quotas))


X = torch.zeros(2, 6)
ERRORS = [
    ((X, 1), dict(code=X.to(torch.int8), segments=[6]), r"^code: expected None with segments, got a tensor$"),
    ((X, [1, 2]), dict(segments=[6]), r"^keep: expected one int for each of 1 segments, got 2$"),
    ((X, [1, -2]), dict(segments=[3, 3]), r"^keep: expected a whole number >= 0, got -2$"),
    ((X,), dict(segments=[6]), r"^keep: expected a whole number >= 0, got None$"),
    ((X, 1), dict(segments=[6], threshold=0.5), r"^threshold: expected None with segments, got 0\.5$"),
    ((X, -1), dict(segments=[6]), r"^keep: expected a whole number >= 0, got -1$"),
    ((X, 1), dict(segments=[3, 2]), r"^segments: expected lengths >= 0 that add up to 6, got \[3, 2\]$"),
    ((X, 1), dict(segments=[8, -2]), r"^segments: expected lengths >= 0 that add up to 6, got \[8, -2\]$"),
]


@pytest.mark.parametrize("args, kwargs, message", ERRORS)
def test_error_text(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.select_topk(*args, **kwargs)
