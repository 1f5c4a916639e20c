"""received_attention: reference against loops, the kernel against both, then properties and error text."""

import itertools

import pytest
import torch
from torch.library import opcheck

from helpers import slow
from vlmprune import ops
from vlmprune.ops import reference
from vlmprune.ops.scoring import Scoring, ScoringKeywords

HEADS, ROWS, NORMALIZES = ("mean", "max", "sum", "none"), ("mean", "max", "sum"), ("row", "columns", "none")
REDUCES = list(itertools.product(HEADS, ROWS, NORMALIZES))


def run(backend, query, key, **kwargs):
    with ops.use_backend(backend):
        return ops.received_attention(query, key, **kwargs)


def extras(key, rows):
    """A key mask and row weights, one of them zero."""
    mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    mask[0, :3] = False
    weight = torch.linspace(0.0, 2.0, rows.numel()).view(rows.shape).to(rows.device)
    return mask, weight


@pytest.mark.parametrize("head_reduce, row_reduce, normalize", REDUCES)
def test_reference_equals_loops(head_reduce, row_reduce, normalize):
    query, key, rows, columns = slow.inputs()
    mask, weight = extras(key, rows)
    reduces = dict(head_reduce=head_reduce, row_reduce=row_reduce, normalize=normalize)
    how = dict(rows=rows, columns=columns, key_mask=mask, row_weight=weight, scale=0.3)
    out = reference.received_attention(Scoring.checked(query, key, **how, **reduces))
    truth = slow.scores(slow.logits(query, key, None, 0.3), rows, columns, mask, True, weight, **reduces)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_reference_equals_loops_without_extras(causal, rotated):
    query, key, rows, columns = slow.inputs(Sq=21)
    rope = slow.rope() if rotated else None
    how = dict(rows=rows, columns=columns, causal=causal, scale=0.3, rope=rope)
    out = reference.received_attention(Scoring.checked(query, key, **how))
    truth = slow.scores(slow.logits(query, key, rope, 0.3), rows, columns, None, causal)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_reduce, row_reduce, normalize", REDUCES)
def test_triton_reduces_and_normalizes(head_reduce, row_reduce, normalize, device):
    query, key, rows, columns = slow.inputs(device=device)
    mask, weight = extras(key, rows)
    kwargs = dict(rows=rows, columns=columns, key_mask=mask, row_weight=weight)
    kwargs |= dict(head_reduce=head_reduce, row_reduce=row_reduce, normalize=normalize)
    out, expected = run("triton", query, key, **kwargs), run("reference", query, key, **kwargs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("row_reduce", ["mean", "max"])
def test_triton_is_as_exact_as_torch(dtype, causal, rotated, row_reduce, device):
    query, key, rows, columns = slow.inputs(dtype=dtype, device=device)
    mask, _ = extras(key, rows)
    rope = slow.rope(device=device) if rotated else None
    out = run(
        "triton",
        query,
        key,
        rows=rows,
        columns=columns,
        key_mask=mask,
        causal=causal,
        row_reduce=row_reduce,
        rope=rope,
    )
    args = (rows, columns, mask, causal, None, "mean", row_reduce, "row")
    scale = query.shape[-1] ** -0.5
    truth = slow.scores(slow.logits(query, key, rope, scale), *args)
    at_dtype = slow.scores(slow.logits(query, key, rope, scale, rounded=dtype), *args)
    slow.assert_as_good(out, at_dtype, truth)


SHAPES = [
    pytest.param(dict(B=1, H=1, Hkv=1, Sq=1, S=1, D=8, R=1, N=1), id="one"),
    pytest.param(dict(B=3, H=8, Hkv=8, Sq=1, S=37, D=16, R=1, N=31), id="last row, MHA"),
    pytest.param(dict(B=1, H=7, Hkv=1, Sq=9, S=80, D=8, R=9, N=67), id="G=7, columns over one tile"),
    pytest.param(dict(B=1, H=2, Hkv=1, Sq=80, S=80, D=16, R=77, N=5), id="R=77"),
    pytest.param(dict(B=1, H=4, Hkv=2, Sq=70, S=70, D=16, R=64, N=40), id="R=64"),
    pytest.param(dict(B=1, H=2, Hkv=1, Sq=210, S=220, D=16, R=200, N=9), id="R=200"),
    pytest.param(dict(B=1, H=2, Hkv=2, Sq=2, S=33, D=72, R=2, N=33), id="D=72"),
    pytest.param(dict(B=1, H=1, Hkv=1, Sq=20, S=40, D=256, R=20, N=33), id="D=256"),
    pytest.param(dict(B=1, H=1, Hkv=1, Sq=2, S=1100, D=8, R=2, N=150), id="split keys"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", ["row", "columns"])
def test_triton_shapes(shape, normalize, device):
    query, key, rows, columns = slow.inputs(device=device, **shape)
    kwargs = dict(rows=rows, columns=columns, normalize=normalize)
    out, expected = run("triton", query, key, **kwargs), run("reference", query, key, **kwargs)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_lse_is_used_when_given(backend, device):
    query, key, rows, columns = slow.inputs(device=device)
    S, Sq = key.shape[2], query.shape[2]
    every = torch.arange(S - Sq, S, device=device).expand(2, -1)
    lse = ops.row_lse(query, key, every)
    plain = run(backend, query, key, rows=rows, columns=columns)
    given = run(backend, query, key, rows=rows, columns=columns, lse=lse)
    torch.testing.assert_close(given, plain, rtol=1e-5, atol=1e-7)
    shifted = run(
        backend, query, key, rows=rows, columns=columns, lse=(lse + 1.0).transpose(1, 2).contiguous().mT
    )
    torch.testing.assert_close(shifted, plain / torch.e, rtol=1e-5, atol=1e-7)


def test_lse_of_flash_attention_is_ours():
    query, key, rows, columns = slow.inputs(B=1, H=2, Hkv=2, Sq=21)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _, lse = attend(query, key, key, 0.0, True)
    given = ops.received_attention(query, key, rows=rows, columns=columns, lse=lse)
    torch.testing.assert_close(given, ops.received_attention(query, key, rows=rows, columns=columns))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_attention_over_all_columns_sums_to_one(backend, device):
    query, key, rows, _ = slow.inputs(B=1, device=device)
    every = torch.arange(21, device=device)[None]
    out = run(backend, query, key, rows=rows, columns=every, head_reduce="none")
    torch.testing.assert_close(out.sum(-1), torch.ones(1, 4, device=device))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_padding_changes_nothing(backend, device):
    query, key, rows, columns = slow.inputs(B=1, device=device)
    pad = torch.full((1, 2), -1, device=device)
    padded = run(backend, query, key, rows=torch.cat([rows, pad], 1), columns=torch.cat([columns, pad], 1))
    plain = run(backend, query, key, rows=rows, columns=columns)
    assert padded[:, -2:].eq(0).all()
    torch.testing.assert_close(padded[:, :-2], plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_max_ignores_rows_that_cannot_see_the_column(backend, device):
    query, key, _, _ = slow.inputs(B=1, H=1, Hkv=1, device=device)
    rows = torch.tensor([[10, 12]], device=device)
    columns = torch.tensor([[11, 15]], device=device)
    kwargs = dict(rows=rows, columns=columns, row_reduce="max", normalize="none", scale=1.0)
    logit = (query[0, 0, 12 - 8] @ key[0, 0, 11]).item()  # may be negative: a 0 of row 10 must not win
    for sign in (1.0, -1.0):
        out = run(backend, query * sign, key, **kwargs)
        torch.testing.assert_close(out.cpu(), torch.tensor([[sign * logit, 0.0]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_masked_keys_may_hold_nan(backend, device):
    query, key, rows, columns = slow.inputs(B=1, device=device)
    mask, _ = extras(key, rows)
    columns[0, 0] = 1
    clean = run(backend, query, key, rows=rows, columns=columns, key_mask=mask)
    key[0, :, :3] = float("nan")
    assert clean[0, 0] == 0
    assert torch.equal(run(backend, query, key, rows=rows, columns=columns, key_mask=mask), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_reads_any_strides(dtype, device):
    query, key, rows, columns = slow.inputs(dtype=dtype, device=device)
    mask, weight = extras(key, rows)
    q = query.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([key, key], 3)[..., : key.shape[3]]
    r, c, m, w = (torch.stack([t, t], 2)[..., 0] for t in (rows, columns, mask, weight))
    assert not any(t.is_contiguous() for t in (q, k, r, c, m, w))
    packed = run("triton", query, key, rows=rows, columns=columns, key_mask=mask, row_weight=weight)
    assert torch.equal(run("triton", q, k, rows=r, columns=c, key_mask=m, row_weight=w), packed)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rope_tables_may_differ_in_stride_and_batch(backend, device):
    query, key, rows, columns = slow.inputs(device=device)
    cos, sin = slow.rope(device=device)
    plain = run(backend, query, key, rows=rows, columns=columns, rope=(cos, sin))
    batched = (cos.expand(2, -1, -1).contiguous(), sin.expand(2, -1, -1))
    assert torch.equal(run(backend, query, key, rows=rows, columns=columns, rope=batched), plain)


def test_triton_repeats_bit_for_bit(device):
    query, key, rows, columns = slow.inputs(S=70, N=67, device=device)
    first = run("triton", query, key, rows=rows, columns=columns)
    assert torch.equal(run("triton", query, key, rows=rows, columns=columns), first)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("row_reduce", ROWS)
@pytest.mark.parametrize("B, R, N", [(0, 2, 3), (2, 0, 3), (2, 2, 0)], ids=["B=0", "R=0", "N=0"])
def test_empty(backend, row_reduce, B, R, N, device):
    query, key, rows, columns = slow.inputs(B=2, R=2, N=3, device=device)
    lists = dict(rows=rows[:B, :R], columns=columns[:B, :N])
    out = run(backend, query[:B], key[:B], row_reduce=row_reduce, **lists)
    assert out.shape == (B, N) and out.dtype == torch.float32 and out.eq(0).all()
    assert run(backend, query[:B], key[:B], head_reduce="none", **lists).shape == (B, 4, N)


@pytest.mark.parametrize("head_reduce", ["mean", "none"])
@pytest.mark.parametrize("rotated", [False, True])
def test_schema_and_fake_agree(head_reduce, rotated, device):
    query, key, rows, columns = slow.inputs(device=device)
    mask, weight = extras(key, rows)
    rope = slow.rope(device=device) if rotated else None
    how = dict(rows=rows, columns=columns, key_mask=mask, row_weight=weight, head_reduce=head_reduce)
    scoring = Scoring.checked(query, key, **how, scale=0.2, rope=rope)
    opcheck(torch.ops.vlmprune.received_attention.default, tuple(scoring))


def test_compiles_without_graph_breaks(device):
    query, key, rows, columns = slow.inputs(device=device)

    def score(query, key):
        return ops.received_attention(query, key, rows=rows, columns=columns) * 2

    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key), score(query, key))


ERRORS = [
    (dict(query=lambda a: a["query"][0]), r"^query: expected rank 4 \[B, H, Sq, D\], got \(4, 13, 24\)$"),
    (dict(key=lambda a: a["key"][..., 0]), r"^key: expected rank 4 \[B, Hkv, S, D\], got \(2, 2, 21\)$"),
    (dict(rows=lambda a: a["rows"][:1]), r"^rows: expected \[2, R\], got \(1, 5\)$"),
    (dict(columns=lambda a: a["columns"].int()), r"^columns: expected int64, got torch\.int32$"),
    (
        dict(rows=lambda a: torch.tensor([[8, 20], [20, 21]])),
        r"^rows: expected positions in \[8, 21\) or -1, got 21$",
    ),
    (
        dict(columns=lambda a: torch.tensor([[0, -2], [20, -1]])),
        r"^columns: expected positions in \[0, 21\) or -1, got -2$",
    ),
    (dict(columns=lambda a: a["columns"].to("meta")), r"^columns: expected the device cpu, got meta$"),
    (dict(key_mask=lambda a: torch.ones(21) > 0), r"^key_mask: expected \[2, 21\], got \(21,\)$"),
    (dict(lse=lambda a: torch.ones(2, 4, 5)), r"^lse: expected \[2, 4, 13\], got \(2, 4, 5\)$"),
    (dict(lse=lambda a: torch.ones(2, 4, 13).half()), r"^lse: expected float32, got torch\.float16$"),
    (
        dict(lse=lambda a: torch.ones(2, 4, 13), normalize=lambda a: "columns"),
        r"^lse: expected None unless normalize is 'row', got a tensor with normalize='columns'$",
    ),
    (
        dict(lse=lambda a: torch.ones(2, 4, 13), rope=lambda a: (torch.ones(1, 21, 24),) * 2),
        r"^lse: expected None with rope \(it belongs to the rotated scores\), got a tensor$",
    ),
    (dict(row_weight=lambda a: torch.ones(2, 4)), r"^row_weight: expected \[2, 5\], got \(2, 4\)$"),
    (
        dict(row_weight=lambda a: torch.ones(2, 5).long()),
        r"^row_weight: expected float32, float16 or bfloat16, got torch\.int64$",
    ),
    (
        dict(head_reduce=lambda a: "median"),
        r"^head_reduce: expected one of mean, max, sum, none, got 'median'$",
    ),
    (dict(row_reduce=lambda a: "none"), r"^row_reduce: expected one of mean, max, sum, got 'none'$"),
    (dict(normalize=lambda a: "all"), r"^normalize: expected one of row, columns, none, got 'all'$"),
    (
        dict(rope=lambda a: (torch.ones(1, 21, 12),) * 2),
        r"^rope: expected cos \[2 or 1, 21, 24\], got \(1, 21, 12\)$",
    ),
]


@pytest.mark.parametrize("changes, message", ERRORS)
def test_error_text(changes, message):
    args = dict(zip(("query", "key", "rows", "columns"), slow.inputs(), strict=True))
    args |= {name: change(args) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        ops.received_attention(args.pop("query"), args.pop("key"), **args)


def test_keywords_are_those_of_a_scoring():
    query, key, rows, columns = slow.inputs()
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'colums'$"):
        ops.received_attention(query, key, rows=rows, columns=columns, colums=columns)
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'columns'$"):
        ops.received_attention(query, key, rows=rows)
    words = {*ScoringKeywords.__annotations__, "query", "key", "cos", "sin"} - {"rope"}
    assert words == {*Scoring._fields}
    schema = torch.ops.vlmprune.received_attention.default._schema
    assert [x.name for x in schema.arguments] == [*Scoring._fields]


def test_an_op_without_a_backend_says_why():
    query, key, rows, columns = slow.inputs()
    with pytest.raises(ops._dispatch.BackendError) as info, ops.use_backend("cuda"):
        ops.received_attention(query, key, rows=rows, columns=columns)
    assert str(info.value).startswith(
        "no backend can run received_attention on (2, 4, 13, 24) torch.float32 cpu\n"
    )
    assert "reference: not the forced backend 'cuda'" in str(info.value)
