"""Pair weights and the best heads of received_attention: reference against loops, the kernel against it, then properties."""

import itertools

import pytest
import torch

from helpers import slow
from vlmprune import ops
from vlmprune.errors import InputError
from vlmprune.ops import reference
from vlmprune.ops.scoring import Scoring

HEADS, ROWS, NORMALIZES = ("mean", "max", "sum"), ("mean", "max", "sum"), ("row", "columns", "none")
REDUCES = list(itertools.product(HEADS, ROWS, NORMALIZES))
BACKENDS = ["reference", "triton"]


def run(backend, query, key, **kwargs):
    with ops.use_backend(backend):
        return ops.received_attention(query, key, **kwargs)


def pairs(rows, columns, seed=1):
    """Weights of pairs, some of them negative or zero."""
    shape = (*rows.shape, columns.shape[1])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    weight[:, 0, :2] = 0.0
    return weight.to(rows.device)


def extras(key, rows):
    mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    mask[0, :3] = False
    return dict(
        key_mask=mask, row_weight=torch.linspace(0.0, 2.0, rows.numel()).view(rows.shape).to(key.device)
    )


@pytest.mark.parametrize("head_reduce, row_reduce, normalize", REDUCES)
@pytest.mark.parametrize("top_heads", [None, 1, 3])
def test_reference_equals_loops(head_reduce, row_reduce, normalize, top_heads):
    query, key, rows, columns = slow.inputs()
    how = dict(head_reduce=head_reduce, row_reduce=row_reduce, normalize=normalize)
    how |= dict(pair_weight=pairs(rows, columns), top_heads=top_heads, **extras(key, rows))
    out = reference.received_attention(
        Scoring.checked(query, key, rows=rows, columns=columns, scale=0.3, **how)
    )
    truth = slow.scores(slow.logits(query, key, None, 0.3), rows, columns, **how)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_reduce, row_reduce, normalize", REDUCES)
@pytest.mark.parametrize("top_heads, weighted", [(None, True), (1, True), (3, True), (3, False)])
def test_triton_equals_the_reference(head_reduce, row_reduce, normalize, top_heads, weighted, device):
    query, key, rows, columns = slow.inputs(device=device)
    how = dict(rows=rows, columns=columns, head_reduce=head_reduce, row_reduce=row_reduce)
    how |= dict(normalize=normalize, top_heads=top_heads, **extras(key, rows))
    weighted = (
        weighted or normalize == "columns"
    )  # whose shares add up to 1 in every head, else: the rounding would choose
    how |= dict(pair_weight=pairs(rows, columns) if weighted else None)
    out, expected = run("triton", query, key, **how), run("reference", query, key, **how)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotated", [False, True])
def test_triton_is_as_exact_as_torch(dtype, rotated, device):
    query, key, rows, columns = slow.inputs(dtype=dtype, device=device)
    rope = slow.rope(device=device) if rotated else None
    how = dict(pair_weight=pairs(rows, columns), top_heads=2)
    out = run("triton", query, key, rows=rows, columns=columns, rope=rope, **how)
    scale = query.shape[-1] ** -0.5
    truth = slow.scores(slow.logits(query, key, rope, scale), rows, columns, **how)
    at_dtype = slow.scores(slow.logits(query, key, rope, scale, rounded=dtype), rows, columns, **how)
    slow.assert_as_good(out, at_dtype, truth)


SHAPES = [
    pytest.param(dict(B=1, H=2, Hkv=1, Sq=1, S=1, D=8, R=1, N=1), 1, id="one column"),
    pytest.param(dict(B=1, H=7, Hkv=1, Sq=9, S=80, D=8, R=9, N=67), 5, id="G=7, columns over one tile"),
    pytest.param(dict(B=2, H=2, Hkv=1, Sq=80, S=80, D=16, R=77, N=5), 1, id="R=77"),
    pytest.param(dict(B=2, H=22, Hkv=11, Sq=13, S=21, D=8, R=5, N=9), 14, id="more than are joined at once"),
    pytest.param(dict(B=1, H=33, Hkv=33, Sq=2, S=700, D=8, R=2, N=600), 9, id="columns over one chunk"),
    pytest.param(dict(B=2, H=4, Hkv=2, R=0), 2, id="no rows"),
]


@pytest.mark.parametrize("shape, top_heads", SHAPES)
def test_shapes(shape, top_heads, device):
    query, key, rows, columns = slow.inputs(device=device, **shape)
    how = dict(rows=rows, columns=columns, pair_weight=pairs(rows, columns) if rows.numel() else None)
    out, expected = (run(x, query, key, top_heads=top_heads, **how) for x in ("triton", "reference"))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(run("triton", query, key, top_heads=top_heads, **how), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_divides_by_row_weights_alone(backend, device):
    """So a pair weight of 2 doubles everything, one that is the same for a row is a row weight of the sum."""
    query, key, rows, columns = slow.inputs(device=device)
    how = dict(rows=rows, columns=columns)
    ones = torch.ones(*rows.shape, columns.shape[1], device=device)
    plain = run(backend, query, key, **how)
    assert torch.equal(run(backend, query, key, pair_weight=ones, **how), plain)
    assert torch.equal(run(backend, query, key, pair_weight=2 * ones, **how), 2 * plain)
    weight = pairs(rows, columns)[..., 0]
    by_row = run(backend, query, key, row_weight=weight, row_reduce="sum", **how)
    spread = (weight[..., None] * ones).mT.contiguous().mT  # in other strides
    got = run(backend, query, key, pair_weight=spread, row_reduce="sum", **how)
    torch.testing.assert_close(got, by_row, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_pairs_that_do_not_count_may_be_anything(backend, device):
    query, key, rows, columns = slow.inputs(device=device)
    mask = extras(key, rows)["key_mask"]
    weight = pairs(rows, columns)
    how = dict(rows=rows, columns=columns, key_mask=mask, top_heads=2)
    clean = run(backend, query, key, pair_weight=weight, **how)
    at = columns.clamp(min=0)
    seen = (columns >= 0) & mask.gather(1, at)
    ok = (rows >= 0)[:, :, None] & seen[:, None, :] & (at[:, None, :] <= rows[:, :, None])
    for value in (float("nan"), float("inf")):
        spoilt = weight.masked_fill(~ok, value)
        assert torch.equal(run(backend, query, key, pair_weight=spoilt, **how), clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_heads", [4, 14])
def test_as_many_as_there_are_is_all(backend, top_heads, device):
    query, key, rows, columns = slow.inputs(device=device)
    plain = run(backend, query, key, rows=rows, columns=columns)
    assert torch.equal(run(backend, query, key, rows=rows, columns=columns, top_heads=top_heads), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_head(backend, device):
    """Heads 0 and 1 are the same but for the order of columns, heads 2 and 3 receive the least."""
    query, key, rows, columns = slow.inputs(B=1, H=4, Hkv=4, R=1, N=2, device=device)
    query[:], key[:] = 0.0, 0.0
    query[..., 0] = 1.0
    columns = torch.tensor([[3, 5]], device=device)
    for head, (left, right) in enumerate([(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (-0.0, 0.0)]):
        key[0, head, 3, 0], key[0, head, 5, 0] = left, right
    how = dict(rows=rows, columns=columns, normalize="none", scale=1.0, head_reduce="sum")
    for top_heads, want in ((1, [1.0, 2.0]), (2, [3.0, 3.0]), (3, [4.0, 4.0])):
        assert run(backend, query, key, top_heads=top_heads, **how).tolist() == [want]
    flipped = run(backend, query.flip(1), key.flip(1), top_heads=1, **how)
    assert flipped.tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_reduce", HEADS)
def test_nan_heads_come_last(backend, head_reduce, device):
    query, key, rows, columns = slow.inputs(B=1, H=4, Hkv=4, device=device)
    key[0, 0, columns[0, 3], 5] = float("nan")
    query[0, 2, :, 0], key[0, 2, columns[0, 1], 0] = 1.0, float("-inf")
    how = dict(rows=rows, columns=columns, causal=False, normalize="none", head_reduce=head_reduce)
    two = run(backend, query, key, top_heads=2, **how)
    sound = run(backend, query[:, 1::2], key[:, 1::2], **how)  # neither NaN nor -inf
    torch.testing.assert_close(two, sound, rtol=1e-6, atol=1e-7)
    three = run(backend, query, key, top_heads=3, **how)
    assert not three.isnan().any() and (head_reduce == "max" or three[0, 1] == float("-inf"))
    assert run(backend, query, key, **how)[0, 3].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_samples_choose_alone(backend, device):
    g, lengths = torch.Generator().manual_seed(0), (21, 13)
    query, key = (torch.randn(1, heads, 34, 16, generator=g).to(device) for heads in (6, 3))
    rows, columns = (torch.tensor(x, device=device) for x in ([[3, 20], [12, -1]], [[0, 2, 7], [1, 4, -1]]))
    weight, ends = pairs(rows, columns), torch.tensor([0, 21, 34], dtype=torch.int32, device=device)
    how = dict(rows=rows, columns=columns, pair_weight=weight)
    out = run(backend, query, key, cu_seqlens=ends, top_heads=2, **how)
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), strict=True)
    for b, (q, k) in enumerate(parts):
        one = {name: x[b : b + 1] for name, x in how.items()}
        torch.testing.assert_close(
            out[b : b + 1], run(backend, q, k, top_heads=2, **one), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, R", [(torch.float32, 5), (torch.float16, 40)], ids=str)
@pytest.mark.parametrize("N", [9, 4200])
def test_prune_tokens_goes_by_them(backend, N, dtype, R, device):
    """Also where many columns are selected by wider programs, whose tiles add up in the same order."""
    shape = dict(B=1, S=max(60, N + 4), Sq=50, R=R, D=8, N=N, dtype=dtype)
    query, key, rows, columns = slow.inputs(**shape, device=device)
    how = dict(rows=rows, columns=columns, pair_weight=pairs(rows, columns), top_heads=3)
    scores = run(backend, query, key, **how)
    with ops.use_backend(backend):
        out = ops.prune_tokens(query, key, [key], keep=4, **how)
        want = ops.prune_scored(scores, [key], keep=4, columns=columns)
    assert torch.equal(out.scores, scores) and torch.equal(out.index, want.index)


def test_schema_and_fake_agree(device):
    query, key, rows, columns = slow.inputs(device=device)
    how = dict(rows=rows, columns=columns, pair_weight=pairs(rows, columns), top_heads=2)
    scoring = Scoring.checked(query, key, **how)
    torch.library.opcheck(torch.ops.vlmprune.received_attention.default, tuple(scoring))
    compiled = torch.compile(ops.received_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, **how), ops.received_attention(query, key, **how))


ERRORS = [
    (dict(pair_weight=torch.ones(2, 9, 5)), r"^pair_weight: expected \[2, 5, 9\], got \(2, 9, 5\)$"),
    (dict(pair_weight=torch.ones(2, 5, 9).half()), r"^pair_weight: expected float32, got torch\.float16$"),
    (
        dict(pair_weight=torch.ones(2, 5, 9, device="meta")),
        r"^pair_weight: expected the device cpu, got meta$",
    ),
    (dict(top_heads=0), r"^top_heads: expected a whole number >= 1, got 0$"),
    (dict(top_heads=2.0), r"^top_heads: expected a whole number >= 1, got 2\.0$"),
    (
        dict(top_heads=2, head_reduce="none"),
        r"^top_heads: expected None with head_reduce='none', which joins no heads, got 2$",
    ),
]


@pytest.mark.parametrize("wrong, message", ERRORS)
def test_error_text(wrong, message):
    query, key, rows, columns = slow.inputs()
    with pytest.raises(InputError, match=message):
        ops.received_attention(query, key, rows=rows, columns=columns, **wrong)
