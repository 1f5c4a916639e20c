"""received_attention where the query heads of a KV head and the scoring rows share one matrix product, and where not."""

import itertools

import pytest
import torch

from helpers import slow
from vlmprune import ops

REDUCTIONS = list(itertools.product(("mean", "max", "sum"), ("mean", "max", "sum", "none")))


@pytest.mark.parametrize("G, R", [(1, 1), (1, 17), (2, 1), (2, 3), (5, 3), (7, 1), (7, 2), (7, 3)])
def test_triton_equals_reference(G, R, device):
    """G x R up to 16 and beyond; two KV heads; padded rows, weights of rows and of pairs."""
    query, key, rows, columns = slow.inputs(B=2, H=2 * G, Hkv=2, S=60, Sq=50, R=R, D=8, N=40, device=device)
    weights = torch.rand(2, R, generator=torch.Generator().manual_seed(G)).to(device)
    pairs = torch.rand(2, R, 40, generator=torch.Generator().manual_seed(R)).to(device)
    for i, (over_rows, over_heads) in enumerate(REDUCTIONS):
        how = dict(rows=rows, columns=columns, row_reduce=over_rows, head_reduce=over_heads)
        how |= dict(row_weight=weights) if i % 2 else {}
        how |= dict(pair_weight=pairs) if i % 3 == 1 else {}
        out, want = (scores(backend, query, key, **how) for backend in ("triton", "reference"))
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def scores(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return ops.received_attention(*args, **kwargs)


@pytest.mark.parametrize(
    "G, R, heads, rows, one",
    [
        (7, 1, 8, 2, True),
        (7, 2, 8, 2, True),
        (5, 3, 8, 4, True),
        (3, 5, 4, 8, True),
        (7, 5, 1, 16, False),
        (1, 16, 1, 16, True),
        (1, 64, 1, 64, True),
        (4, 64, 1, 64, False),
    ],
)
def test_up_to_16_rows_are_one_product(G, R, heads, rows, one):
    from vlmprune.ops.scoring import Scoring
    from vlmprune.triton_kernels.score_select import _config

    query, key = torch.zeros(1, 4 * G, 80, 64).half(), torch.zeros(1, 4, 80, 64).half()
    lists = dict(rows=torch.zeros(1, R, dtype=torch.int64), columns=torch.arange(70)[None])
    config = _config(Scoring.checked(query, key, **lists), False)
    assert (config["HEADS"], config["ROWS"], config["ONE_TILE"]) == (heads, rows, one)


@pytest.mark.parametrize("R", [1, 5])
def test_wide_tiles_score_and_select_alike(R, device, monkeypatch):
    """Many columns of many heads are read in tiles twice as wide; here from the first column on."""
    from vlmprune.triton_kernels import score_select

    monkeypatch.setattr(score_select, "WIDE", 0)
    query, key = (torch.randn(2, h, 400, 16, generator=torch.Generator().manual_seed(h)) for h in (6, 2))
    query, key = query.half().to(device), key.half().to(device)
    columns = torch.arange(20, 350).repeat(2, 1)
    columns[1, 200:] = -1
    lists = dict(rows=torch.arange(400 - R, 400).repeat(2, 1).to(device), columns=columns.to(device))
    out, want = (scores(backend, query, key, **lists) for backend in ("triton", "reference"))
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-6)
    with ops.use_backend("triton"):
        pruned = ops.prune_tokens(query, key, [key], **lists, keep=50)
    with ops.use_backend("reference"):
        selected = ops.prune_scored(out, [key], columns=lists["columns"], keep=50)
    assert torch.equal(pruned.index, selected.index)


def test_tiles_are_wide_where_there_are_many():
    from vlmprune.ops.scoring import Scoring
    from vlmprune.triton_kernels.score_select import _config

    def width(Hkv, N, R=1, dtype=torch.float16):
        x = torch.zeros(1, Hkv, N, 16, dtype=dtype)
        lists = dict(rows=torch.zeros(1, R, dtype=torch.int64), columns=torch.arange(N)[None])
        return _config(Scoring.checked(x, x, **lists), False)["BLOCK_N"]

    assert [width(32, N) for N in (576, 2303, 2304, 2880)] == [64, 64, 128, 128]  # LLaVA
    assert [width(4, N) for N in (4096, 16384, 32768)] == [64, 64, 128]  # Qwen2.5-VL
    assert [width(32, 2880, R) for R in (16, 17)] == [128, 64]
    assert width(32, 2880, dtype=torch.float32) < 64


def test_heads_are_divided_where_tiles_are_few():
    """As many programs as run at once: LLaVA-1.5, LLaVA-NeXT, Qwen2.5-VL at 4k, 16k and 32k; six heads."""
    from vlmprune.triton_kernels.score_select import _parts

    shapes = [(32, 9), (32, 45), (4, 64), (4, 256), (4, 512), (6, 100)]
    assert [_parts(*shape) for shape in shapes] == [32, 4, 4, 1, 1, 2]
