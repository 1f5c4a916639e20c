"""received_attention where the query heads of a KV head and the scoring rows share one matrix product, and where not."""

import itertools

import pytest
import torch

from helpers import slow
from vlmprune import ops

REDUCTIONS = list(itertools.product(("mean", "max", "sum"), ("mean", "max", "sum", "none")))


@pytest.mark.parametrize("R", [1, 2, 3, 17])
@pytest.mark.parametrize("G", [1, 2, 5, 7])
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


def test_heads_are_divided_where_tiles_are_few():
    """About 512 programs for a prompt, if it has heads to give them."""
    from vlmprune.triton_kernels.score_select import _parts

    assert [_parts(32, 9), _parts(32, 45), _parts(4, 64), _parts(4, 512), _parts(6, 100)] == [32, 16, 4, 1, 6]
