"""The CUDA compaction, launcher and kernel, run on the CPU, equals the reference; its barrier is needed."""

import pytest
import torch

from vlmprune.ops import reference


@pytest.fixture
def compact(tensor_rows):
    """Return a function (caches, index) -> compacted copies of the caches, by the emulated kernel."""

    def run(caches, index, launches=1, **order):
        copies = [twin(x) for x in caches]
        _, taken = tensor_rows.run("compact_kv", copies, index, **order)
        assert taken == launches
        return copies

    return run


def twin(x):
    """A copy with the strides of ``x``."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def expected(caches, index):
    copies = [x.clone() for x in caches]
    reference.compact_kv(copies, index)
    return copies


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def numbers(*shape, dtype=torch.bfloat16, seed=0):
    """Any bits, NaN included."""
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).view(shape)


def make_index(S, K, B=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(S, generator=g)[:K].sort().values for _ in range(B)])
    index[-1, -2:] = -1
    return index


@pytest.mark.parametrize("seed", [0, 1])
def test_layers_of_many_layouts(compact, seed):
    """Words of 16, 16, 2, 8, 1 and 16 bytes; one slice of columns and several, the last one narrow."""
    index = make_index(301, 150, seed=seed)
    packed = numbers(2, 301, 3, 24)
    caches = [
        numbers(2, 2, 301, 128),
        numbers(2, 1, 310, 80),
        numbers(2, 301, 71),
        numbers(2, 301, 37, dtype=torch.complex64),
        numbers(2, 2, 302, 3, dtype=torch.float8_e4m3fn),
        packed.transpose(1, 2)[..., 8:16],
    ]
    assert_same(compact(caches, index, seed=seed), expected(caches, index))


@pytest.mark.parametrize("shift", [0, 1, 127, 128, 129])
def test_every_row_moves_by_a_few(compact, shift):
    """Targets of one step are sources of the same or the step before: the order that overwrites too early shows."""
    x = torch.arange(300.0).view(1, 1, 300, 1).expand(1, 1, 300, 32).contiguous()
    (got,) = compact([x], torch.arange(shift, 300)[None])
    assert torch.equal(got[:, :, : 300 - shift], x[:, :, shift:])
    assert torch.equal(got[:, :, 300 - shift :], x[:, :, 300 - shift :])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_barrier_is_needed(compact, step):
    """In each step: without it, some order of the threads gives another result."""
    x, index = numbers(1, 1, 384, 64), torch.arange(3, 384)[None]  # 128 rows a step
    want = expected([x], index)
    assert_same(compact([x], index), want)
    results = (compact([x], index, seed=seed, skipped_barrier=step) for seed in range(16))
    assert any(not torch.equal(got.view(torch.uint8), want[0].view(torch.uint8)) for (got,) in results)


def test_more_than_64_caches_take_more_launches(compact):
    caches, index = [torch.arange(4.0).view(1, 4, 1) + 10 * i for i in range(130)], torch.tensor([[1, 3]])
    assert_same(compact(caches, index, launches=3), expected(caches, index))
    assert_same(compact(caches[:64], index), expected(caches[:64], index))


def test_what_is_no_row_stays(compact):
    around = torch.full((2, 2, 40, 6), float("nan"))
    around[:, :, 10:30] = torch.randn(2, 2, 20, 6, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[1, 3, 20, 25, -1], [2, 5, 19, 1 << 40, -7]])
    (want,) = expected([around[:, :, 10:30]], index)
    assert not want.isnan().any()
    assert_same(compact([around[:, :, 10:30]], index), [want])


def test_nothing_around_a_view_is_touched(tensor_rows):
    around = numbers(2, 40, 3, 24, dtype=torch.float32)
    before, index = around.clone(), make_index(20, 9)
    view = around[:, 10:30, 1, 4:11]
    (want,) = expected([view], index)
    tensor_rows.run("compact_kv", [view], index)
    before[:, 10:30, 1, 4:11] = want
    assert torch.equal(around.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("B, H, K, D", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 0, 3, 4), (2, 2, 3, 0)], ids=str)
def test_empty(compact, B, H, K, D):
    x = torch.ones(B, H, 6, D)
    compact([x], torch.arange(K).expand(B, K), launches=1 if x.numel() and K else 0)


ERRORS = [
    (([torch.ones(2, 4, 3)], torch.ones(2, 1)), r"^index: expected int64 \[B, K\], got \[2, 1\] Float"),
    (([torch.ones(2, 4)], torch.ones(2, 1).long()), r"^caches\[0\]: expected rank 3 or 4, got \[2, 4\]"),
    (([torch.ones(1, 4, 3)], torch.ones(2, 1).long()), r"^caches\[0\]: expected the batch size of index, got \[1, 4, 3\]"),
    (([torch.ones(2, 4, 3)], torch.ones(2, 5).long()), r"^index: expected no more columns than a cache has rows, got"),
]  # fmt: skip


@pytest.mark.parametrize("args, message", ERRORS)
def test_error_text(tensor_rows, args, message):
    with pytest.raises(RuntimeError, match=message):
        tensor_rows.run("compact_kv", *args)
