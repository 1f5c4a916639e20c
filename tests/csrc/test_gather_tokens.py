"""The CUDA gather, launcher and kernel, run on the CPU, equals the reference: every rank, width of word and stride."""

import ctypes

import pytest
import torch

from vlmprune.ops import reference


class Rows(ctypes.Structure):
    """TensorRows of csrc/include/vlmprune/tensor_rows.cuh."""

    _fields_ = [("data", ctypes.c_uint64)] + [
        (name, ctypes.c_int64) for name in ("batch_stride", "head_stride", "row_stride", "S", "row_bytes")
    ] + [("heads", ctypes.c_int)]  # fmt: skip


@pytest.fixture
def gather(tensor_rows):
    """Return a function with the reference's signature and result, computed by the emulated kernel, in one launch."""

    def run(tensors, index, launches=1, **order):
        outs, taken = tensor_rows.run("gather_tokens", tensors, index, **order)
        assert taken == launches and all(out.is_contiguous() for out in outs)
        return outs

    return run


def assert_same(outs, expected):
    for out, want in zip(outs, expected, strict=True):
        assert out.dtype == want.dtype and out.shape == want.shape
        assert torch.equal(out.view(torch.uint8), want.contiguous().view(torch.uint8))


def numbers(*shape, dtype=torch.float32, seed=0):
    """Any bits, NaN included."""
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    return (raw > 127 if dtype == torch.bool else raw.to(torch.uint8).view(dtype)).view(shape)


INDEX = torch.tensor([[0, 2, 3, 9, 18, -1, -1], [1, 4, 5, 6, 7, 8, 17]])


def layers(S=19):
    """The ranks and dtypes of a real drop, and words of every width."""
    yield numbers(2, S, 4096, dtype=torch.bfloat16)
    yield torch.arange(S)[None]
    yield numbers(2, S)
    yield numbers(2, S, dtype=torch.bool)
    yield from (numbers(2, 3, S, 8, dtype=torch.bfloat16, seed=i) for i in range(4))
    yield numbers(1, S + 5, 7, dtype=torch.float16)
    yield numbers(2, S, 5)
    yield numbers(2, 2, S, 3, dtype=torch.float8_e4m3fn)
    yield numbers(2, S, 2, dtype=torch.complex64)


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_reference(gather, seed):
    tensors = list(layers())
    assert_same(gather(tensors, INDEX, seed=seed), reference.gather_tokens(tensors, INDEX))


def test_a_head_spans_tiles(gather):
    """1024 words a tile: rows begin and end anywhere in it."""
    index = torch.arange(0, 600, 2)[None]
    tensors = [numbers(1, 2, 600, 20), numbers(1, 601, 13, dtype=torch.int16), torch.arange(600)[None]]
    assert_same(gather(tensors, index), reference.gather_tokens(tensors, index))


def test_any_strides(gather):
    packed = numbers(2, 19, 3, 16)
    tensors = [
        packed.transpose(1, 2)[..., 4:10],
        packed.transpose(1, 2)[..., 1:5],
        packed[:, :, 1, :7],
        packed[..., 0, 3],
        packed[:1, :, 2].expand(2, -1, -1),
    ]
    index = torch.stack([INDEX, INDEX], -1)[..., 0]
    assert not index.is_contiguous() and not any(x.is_contiguous() for x in tensors)
    assert_same(gather(tensors, index), reference.gather_tokens(tensors, index))


def test_more_than_64_tensors_take_more_launches(gather):
    index = torch.tensor([[1, 3]])
    for n, launches in ((64, 1), (65, 2), (130, 3)):
        outs = gather([torch.arange(4)[None] + 10 * i for i in range(n)], index, launches)
        assert [out.tolist() for out in outs] == [[[10 * i + 1, 10 * i + 3]] for i in range(n)]


def test_what_is_no_row_gives_zeros(gather):
    around = torch.full((2, 40, 6), float("nan"))
    x, short = around[:, 10:30].fill_(1.0), torch.ones(1, 3)
    index = torch.tensor([[0, 19, 20, 25, -1], [2, 3, 1 << 40, -(1 << 40), -7]])
    tensors = [x, short, around[:, :0]]
    assert_same(gather(tensors, index), reference.gather_tokens(tensors, index))


@pytest.mark.parametrize("B, K, D", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["B=0", "K=0", "D=0"])
def test_empty(tensor_rows, B, K, D):
    """An empty tensor beside others takes no block, and nothing to do takes no launch."""
    index = torch.zeros(B, K, dtype=torch.int64)
    tensors = [torch.ones(B, 6, D), torch.arange(6.0)[None], torch.ones(B, 0, 6, D)]
    outs, launches = tensor_rows.run("gather_tokens", tensors, index)
    assert_same(outs, reference.gather_tokens(tensors, index))
    assert launches == (1 if B and K else 0)


@pytest.mark.parametrize("change, expected", [
    ({}, 16), ({"data": 8}, 8), ({"other": 4}, 4), ({"row_bytes": 2}, 2), ({"row_stride": 1}, 1), ({"head_stride": 12}, 4),
    ({"batch_stride": 24}, 8), ({"batch_stride": 0, "head_stride": 0}, 16),
])  # fmt: skip
def test_words_are_as_wide_as_alignment_allows(tensor_rows, change, expected):
    fields = dict(
        data=4096, batch_stride=65536, head_stride=4096, row_stride=256, S=19, row_bytes=256, heads=4
    )
    fields |= change
    other = ctypes.c_void_p(fields.pop("other", 512))
    assert tensor_rows.entries.word_bytes(ctypes.byref(Rows(**fields)), other) == expected


ERRORS = [
    (([torch.ones(2, 4)], INDEX.int()), r"^index: expected int64 \[B, K\], got \[2, 7\] Int"),
    (([torch.ones(2, 4), torch.ones(4)], INDEX), r"^tensors\[1\]: expected rank 2 to 4, got \[4\]"),
    (([torch.ones(3, 4)], INDEX), r"^tensors\[0\]: expected the batch size of index, got \[3, 4\]"),
    (([torch.ones(2, 5, 4).mT], INDEX), r"^tensors\[0\]: expected a contiguous last dim, got \[2, 4, 5\]"),
]


@pytest.mark.parametrize("args, message", ERRORS)
def test_error_text(tensor_rows, args, message):
    with pytest.raises(RuntimeError, match=message):
        tensor_rows.run("gather_tokens", *args)
