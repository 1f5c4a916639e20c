"""Which columns survive: codes, segments, the newest row, padding, a cached past; by plain Python loops, on both backends."""

from math import isnan

import pytest
import torch
from torch.library import opcheck

from helpers import slow
from vlmprune import ops
from vlmprune.ops.selection import Selection

BACKENDS = ["reference", "triton"]
B, S, N = 3, 40, 22


def scored(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return ops.prune_scored(*args, **kwargs)


def pruned(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return ops.prune_tokens(*args, **kwargs)


def problem(device="cpu", seed=0, n=N, s=S, samples=B):
    """Scores of few different values, NaN among them; columns, of which the second sample pads three; a mask; what to shorten."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (samples, n), generator=g) / 2
    scores[torch.rand(samples, n, generator=g) < 0.1] = float("nan")
    columns = torch.stack([torch.randperm(s, generator=g)[:n].sort().values for _ in range(samples)])
    if samples > 1:
        columns[1, n - 3 :] = -1
    mask = torch.rand(samples, s, generator=g) < 0.85
    tensors = [torch.randn(samples, s, 3, generator=g), torch.arange(s)[None]]
    return (
        scores.to(device),
        columns.to(device),
        mask.to(device),
        [t.to(device) for t in tensors],
        torch.randint(0, 4, (samples, n), generator=g, dtype=torch.int8).to(device),
    )


def chosen(scores, competing, keep, ahead):
    """The ``keep`` best of the columns that compete, ``ahead`` before all others."""

    def rank(n):
        value = scores[n]
        return (n != ahead, isnan(value), -value if not isnan(value) else 0.0, n)

    return set(sorted(competing, key=rank)[: max(keep, 0)])


def by_hand(scores, columns, visible, code, segments, keeps, newest, rows, width, most, left):
    """(index, count, kept, columns) of one sample, lists all."""
    first = len(visible) - rows
    real = [n for n, c in enumerate(columns) if c >= 0 and visible[c]]
    last = max([p for p, ok in enumerate(visible) if ok], default=-1)
    ahead = next((n for n in real if newest and columns[n] == last and code[n] != 1), None)
    stays = {n for n in real if code[n] in (1, 3) and n != ahead}
    start = 0
    for length, keep in zip(segments, keeps, strict=True):
        inside = [n for n in real if start <= n < start + length and (code[n] in (0, 3) or n == ahead)]
        stays |= chosen(scores, inside, keep, ahead)
        start += length
    dropped = {columns[n] for n in real if n not in stays}
    index = [p - first for p in range(first, len(visible)) if visible[p] and p not in dropped]
    count = len(index)
    pad = [-1] * (width - count)
    index = [*pad, *index[max(count - width, 0) :]] if left else [*index[:width], *pad]
    kept = sorted(stays)[:most]
    where = [
        index.index(columns[n] - first) if columns[n] - first in index and columns[n] >= first else -1
        for n in kept
    ]
    fill = [-1] * (most - len(kept))
    return index, count, kept + fill, where + fill


def expected(scores, columns, mask, code, segments, keep, newest, rows, width, most, left):
    """``by_hand`` of a batch."""
    samples, n = columns.shape
    out = []
    for b in range(samples):
        lengths = [n] if segments is None else segments[b].tolist()
        keeps = [keep] * len(lengths) if isinstance(keep, int) else keep[b].reshape(-1).tolist()
        codes = [0] * n if code is None else code[b].tolist()
        lists = (scores[b].tolist(), columns[b].tolist(), mask[b].tolist())
        out.append(by_hand(*lists, codes, lengths, keeps, newest, rows, width, most, left))
    return [list(x) for x in zip(*out, strict=True)]


def assert_is(out, truth):
    for name, value in zip(("index", "count", "kept", "columns"), truth, strict=True):
        assert getattr(out, name).tolist() == value, name


SEGMENTS = torch.tensor([[7, 0, 9], [0, 19, 2], [1, 1, 20]])
QUOTAS = torch.tensor([[3, 1, -2], [1, 4, 9], [0, 2, 5]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coded, newest", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("cut", ["whole", "segments", "quotas"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("width, most", [(None, None), (17, 5)])
def test_survivors_are_the_definition(backend, coded, newest, cut, padding, width, most, device):
    for seed, keep in enumerate((0, 1, 6)):
        scores, columns, mask, tensors, code = problem(device, seed)
        segments = None if cut == "whole" else SEGMENTS.to(device)
        keep = QUOTAS.to(device) + seed if cut == "quotas" else keep
        settings = dict(segments=segments, newest=newest, width=width, most=most, padding=padding, keep=keep)
        lists = dict(columns=columns, key_mask=mask, code=code if coded else None)
        out = scored(backend, scores, tensors, **lists, **settings)
        most_of = (keep if cut == "whole" and not coded else N) if most is None else most
        truth = expected(
            scores,
            columns,
            mask,
            lists["code"],
            segments,
            keep,
            newest,
            S,
            width or S,
            most_of,
            padding == "left",
        )
        assert_is(out, truth)
        with ops.use_backend("reference"):
            gathered = ops.gather_tokens(tensors, out.index)
        assert all(map(torch.equal, out.tensors, gathered))
        assert out.scores is scores and out.cu_seqlens is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_position_competes_unless_columns_are_given(backend, device):
    scores = torch.tensor([[0.3, 0.9, 0.1, 0.9], [0.0, 0.0, 0.0, 1.0]], device=device)
    out = scored(backend, scores, [scores], keep=2)
    assert out.index.tolist() == [[1, 3, -1, -1], [0, 3, -1, -1]] and out.count.tolist() == [2, 2]
    assert out.kept.tolist() == [[1, 3], [0, 3]] and out.columns.tolist() == [[0, 1], [0, 1]]
    alone = scored(backend, scores[:1], [], keep=torch.tensor([3], device=device), width=3)
    assert alone.index.tolist() == [[0, 1, 3]] and alone.tensors == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("newest_code, kept", [(0, [5]), (1, [1, 5]), (2, [5]), (3, [5])])
def test_the_newest_row_comes_first(backend, newest_code, kept, device):
    """Whatever its score, and its code unless that keeps it anyway; the mask hides the position behind it."""
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.4, float("nan"), 2.0]], device=device)
    code = torch.zeros(1, 7, dtype=torch.int8, device=device)
    code[0, 5] = newest_code
    mask = torch.arange(7, device=device)[None] < 6
    out = scored(backend, scores, [scores], keep=1, code=code, key_mask=mask, newest=True)
    assert out.kept[0, : len(kept)].tolist() == kept and out.count.tolist() == [len(kept)]
    none = scored(backend, scores, [scores], keep=0, code=code, key_mask=mask, newest=True)
    assert none.count.tolist() == [newest_code == 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("rows, width", [(21, 21), (16, 16), (16, 7), (4, 4)])
def test_a_cached_past_is_left_alone(backend, padding, rows, width, device):
    """The tensors are the last rows of key; columns may lie before them."""
    query, key, lists, columns = slow.inputs(device=device)
    mask = torch.ones(2, 21, dtype=torch.bool, device=device)
    mask[0, 17] = mask[1, 2] = False
    tensors = [torch.randn(2, rows, 3, device=device), key[:, :, 21 - rows :]]
    call = dict(rows=lists, columns=columns, key_mask=mask, keep=3, width=width, padding=padding, newest=True)
    out = pruned(backend, query, key, tensors, **call)
    truth = expected(out.scores, columns, mask, None, None, 3, True, rows, width, 3, padding == "left")
    assert_is(out, truth)
    with ops.use_backend("reference"):
        assert all(map(torch.equal, out.tensors, ops.gather_tokens(tensors, out.index)))


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_scored_in_the_kernel_as_by_itself(coded, cut, device):
    query, key, lists, columns = slow.inputs(device=device, S=40, Sq=40, N=22)
    code = (columns % 4).to(torch.int8) if coded else None
    segments = torch.tensor([[5, 9, 0], [1, 2, 19]], device=device) if cut else None
    how = dict(code=code, segments=segments, keep=2, columns=columns)
    out = pruned("triton", query, key, [key], rows=lists, **how)
    for backend in BACKENDS:
        again = scored(backend, out.scores, [key], **how)
        for name in ("index", "count", "kept", "columns"):
            assert torch.equal(getattr(out, name), getattr(again, name))


@pytest.mark.parametrize("n", [1, 1023, 1025, 6200])
def test_longer_than_a_chunk(n, device):
    """One pass, one program, or several: each of the same columns and positions."""
    scores, columns, mask, tensors, code = problem(device, n=n, s=n + 40, samples=2)
    lengths = torch.tensor([[n // 2, n // 4], [n // 3, n - n // 3]], device=device)
    quotas = torch.tensor([n // 3, 7], device=device)
    for how in (
        dict(keep=n // 3),
        dict(keep=quotas, width=n // 2, most=n // 4),
        dict(keep=n // 7, newest=True),
        dict(keep=n // 5, segments=lengths, code=code, newest=True, padding="left"),
    ):
        lists = dict(columns=columns, key_mask=mask)
        out, truth = (scored(backend, scores, tensors, **lists, **how) for backend in BACKENDS[::-1])
        for name in ("index", "count", "kept", "columns"):
            assert torch.equal(getattr(out, name), getattr(truth, name))


@pytest.mark.parametrize("n, own", [(576, []), (2880, []), (4097, ["_select_columns_kernel"])])
def test_launches(n, own, device):
    """Three (two with a log-sum-exp), and one more to select from many columns; two for scores that are given."""
    from vlmprune.triton_kernels._launch import recording

    query, key, lists, columns = slow.inputs(B=1, H=1, Hkv=1, Sq=1, S=n + 9, D=8, R=1, N=n, device=device)
    with recording() as launches:
        pruned("triton", query, key, [key], rows=lists, columns=columns, keep=9)
    found = [launch.kernel.__name__ for launch in launches]
    assert found == ["_row_lse_kernel", "_score_select_kernel", *own, "_gather_tokens_kernel"]
    with recording() as launches:
        scored("triton", torch.zeros(1, n, device=device), [key[:, :, :n]], keep=9)
    assert [launch.kernel.__name__ for launch in launches] == [
        "_select_columns_kernel",
        "_gather_tokens_kernel",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("b, s, n", [(0, 4, 3), (2, 4, 0), (2, 0, 0)], ids=["B=0", "N=0", "S=0"])
def test_empty(backend, b, s, n, device):
    scores, at = torch.zeros(b, n, device=device), torch.arange(n, device=device).expand(b, n)
    out = scored(backend, scores, [torch.ones(b, s, 2, device=device)], columns=at, keep=0)
    assert out.tensors[0].shape == (b, s, 2) and out.kept.shape == out.columns.shape == (b, 0)
    assert out.count.tolist() == [s - n] * b and out.index.tolist() == [list(range(s))] * b


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_flows_through_the_gathered_tensors(backend, device):
    scores, columns, mask, (hidden, ids), _ = problem(device)
    out = scored(
        backend,
        scores.requires_grad_(),
        [hidden.requires_grad_(), ids],
        columns=columns,
        key_mask=mask,
        keep=3,
    )
    out.tensors[0].sum().backward()
    kept = torch.zeros(B, S + 1, device=device).scatter(1, out.index.where(out.index >= 0, S), 1.0)[:, :S]
    assert torch.equal(hidden.grad, kept[..., None].expand(B, S, 3)) and scores.grad is None


@pytest.mark.parametrize("cut", [False, True])
def test_schema_and_fake_agree(cut, device):
    scores, columns, mask, (hidden, ids), code = problem(device)
    how = dict(keep=QUOTAS.to(device), segments=SEGMENTS.to(device), code=code) if cut else dict(keep=3)
    selection = Selection.checked(scores, B, N, S, **how, padding="left", newest=cut)
    args = ([hidden.requires_grad_(), ids], *selection, scores, columns, mask, S)
    opcheck(torch.ops.vlmprune.prune_scored.default, args)


BAD = torch.zeros(B, N)
ERRORS = [
    (dict(scores=BAD.double()), r"^scores: expected float32, got torch\.float64$"),
    (dict(scores=BAD[0]), r"^scores: expected \[B, N\], got \(22,\)$"),
    (dict(columns=None), r"^columns: expected positions, as there are 40 and 22 scores, got None$"),
    (dict(columns=BAD), r"^columns: expected int64, got torch\.float32$"),
    (dict(tensors=[], length=21), r"^columns: expected at most 21 positions, got 22$"),
    (dict(columns=BAD.long()), r"^columns: expected positions that ascend, then -1 only, got others$"),
    (dict(length=41), r"^tensors\[0\]: expected 41 positions, got \(3, 40, 3\)$"),
    (dict(key_mask=torch.ones(3, 39) > 0), r"^key_mask: expected \[3, 40\], got \(3, 39\)$"),
    (dict(keep=23), r"^keep: expected a whole number in 0\.\.22, got 23$"),
    (dict(keep=torch.ones(3).long(), segments=SEGMENTS), r"^keep: expected \[3, 3\], got \(3,\)$"),
    (dict(code=BAD), r"^code: expected int8, got torch\.float32$"),
    (dict(code=BAD.to(torch.int8)[:, 1:]), r"^code: expected \[3, 22\], got \(3, 21\)$"),
    (dict(code=BAD.to(torch.int8) + 4), r"^code: expected 0, 1, 2 or 3, got others$"),
    (dict(segments=SEGMENTS[:2]), r"^segments: expected \[3, G\], got \(2, 3\)$"),
    (
        dict(segments=SEGMENTS + 4),
        r"^segments: expected lengths >= 0 of at most 22 columns, got \[\[11, 4, 13\], ",
    ),
    (dict(padding="both"), r"^padding: expected one of right, left, got 'both'$"),
    (dict(newest=1), r"^newest: expected True or False, got 1$"),
    (dict(width=41), r"^width: expected a whole number in 0\.\.40, got 41$"),
    (dict(most=23), r"^most: expected a whole number in 0\.\.22, got 23$"),
]


@pytest.mark.parametrize("changes, message", ERRORS)
def test_error_text(changes, message):
    scores, columns, mask, tensors, _ = problem()
    call = dict(scores=scores, tensors=tensors, columns=columns, key_mask=mask, keep=3) | changes
    with pytest.raises(ValueError, match=message):
        ops.prune_scored(**call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [None, 2])
def test_no_samples_with_a_quota_each(backend, parts, device):
    shape = (0,) if parts is None else (0, parts)
    lists = dict(keep=torch.zeros(shape, dtype=torch.int64, device=device))
    if parts is not None:
        lists["segments"] = lists["keep"]
    with ops.use_backend(backend):
        out = ops.prune_scored(
            torch.zeros(0, 3, device=device), [torch.zeros(0, 3, 4, device=device)], **lists
        )
    assert out.tensors[0].shape == (0, 3, 4) and out.kept.shape == (0, 3) and out.count.shape == (0,)
