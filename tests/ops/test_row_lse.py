"""row_lse: reference against loops, the kernel against both, then edges and error text."""

import pytest
import torch
from torch.library import opcheck

from helpers import slow
from vlmprune import ops
from vlmprune.ops import reference, scoring
from vlmprune.ops.scoring import Scoring

HALVES = [torch.float16, torch.bfloat16]


def run(backend, *args, **kwargs):
    with ops.use_backend(backend):
        return ops.row_lse(*args, **kwargs)


def key_mask_for(key):
    mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    mask[0, :3] = False
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_reference_equals_loops(causal, masked, rotated):
    query, key, rows, _ = slow.inputs()
    mask = key_mask_for(key) if masked else None
    rope = slow.rope() if rotated else None
    how = dict(rows=rows, columns=rows, key_mask=mask, causal=causal, scale=0.3, rope=rope)
    out = reference.row_lse(Scoring.checked(query, key, **how))
    truth = slow.lse(slow.logits(query, key, rope, 0.3), rows, mask, causal)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotated", [False, True])
def test_triton_equals_truth(dtype, causal, rotated, device):
    query, key, rows, _ = slow.inputs(dtype=dtype, device=device)
    mask, rope = key_mask_for(key), slow.rope(B=2, device=device) if rotated else None
    out = run("triton", query, key, rows, mask, causal, rope=rope)
    scale = query.shape[-1] ** -0.5
    truth = slow.lse(slow.logits(query, key, rope, scale), rows, mask, causal)
    at_dtype = slow.lse(slow.logits(query, key, rope, scale, rounded=dtype), rows, mask, causal)
    slow.assert_as_good(out, at_dtype, truth)


SHAPES = [
    pytest.param(dict(B=1, H=1, Hkv=1, Sq=1, S=1, D=8, R=1), id="one"),
    pytest.param(dict(B=1, H=7, Hkv=1, Sq=9, S=67, D=8, R=9), id="G=7, rows over one tile"),
    pytest.param(dict(B=1, H=3, Hkv=3, Sq=80, S=80, D=16, R=77), id="R=77"),
    pytest.param(dict(B=1, H=2, Hkv=2, Sq=2, S=33, D=80, R=2), id="D=80"),
    pytest.param(dict(B=1, H=1, Hkv=1, Sq=2, S=40, D=256, R=2), id="D=256"),
    pytest.param(dict(B=2, H=1, Hkv=1, Sq=3, S=1100, D=8, R=3), id="split keys"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_shapes(shape, device):
    query, key, rows, _ = slow.inputs(N=1, device=device, **shape)
    out = run("triton", query, key, rows)
    torch.testing.assert_close(out, run("reference", query, key, rows), rtol=1e-5, atol=1e-5)


def test_split_keys_are_used_and_repeat_bit_for_bit(device):
    from vlmprune.triton_kernels._launch import recording

    query, key, rows, _ = slow.inputs(H=1, Hkv=1, S=1100, D=8, device=device)
    with recording() as launches:
        run("triton", query, key, rows)
    assert launches[0].grid == (2, 1, 3)
    first, second = run("triton", query, key, rows), run("triton", query, key, rows)
    assert torch.equal(first, second)


def test_many_splits_are_joined_in_pieces(device):
    """More than are loaded at once, of which the first ones see nothing."""
    query, key, rows, _ = slow.inputs(B=1, H=1, Hkv=1, S=9000, D=8, R=2, device=device)
    mask = torch.ones(1, 9000, dtype=torch.bool, device=device)
    mask[:, :8700] = False
    for given in (None, mask):
        out, expected = (run(backend, query, key, rows, given) for backend in ("triton", "reference"))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", [3, 700, 1099], ids=["first split", "second split", "last key"])
def test_splits_join_without_overflow(at, device):
    query, key, rows, _ = slow.inputs(H=1, Hkv=1, S=1100, D=8, device=device)
    key[:, :, at] = 200 * query[:, :, -1]
    out = run("triton", query, key, rows, causal=False)
    assert out[0].max() > 200
    torch.testing.assert_close(out, run("reference", query, key, rows, causal=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_that_see_nothing_are_minus_infinity(backend, device):
    query, key, rows, _ = slow.inputs(B=1, R=2, device=device)
    rows[0, 1] = -1
    mask = torch.zeros(1, key.shape[2], dtype=torch.bool, device=device)
    assert run(backend, query, key, rows, mask).eq(float("-inf")).all()
    assert run(backend, query, key, rows).isfinite().tolist() == [[[True, False]] * 4]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_masked_and_future_keys_may_hold_nan(backend, device):
    query, key, rows, _ = slow.inputs(B=1, device=device)
    rows.fill_(key.shape[2] - 2)
    clean = run(backend, query, key, rows, key_mask_for(key))
    key[0, :, :3] = float("nan")
    key[0, :, -1] = float("nan")
    assert torch.equal(run(backend, query, key, rows, key_mask_for(key)), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_reads_any_strides(dtype, device):
    query, key, rows, _ = slow.inputs(dtype=dtype, device=device)
    q = torch.stack([query, query], 2).transpose(1, 3).contiguous().transpose(1, 3)[:, :, 1]
    k = torch.cat([key, key], 3)[..., : key.shape[3]]
    r = torch.stack([rows, rows], 2)[..., 0]
    assert not q.is_contiguous() and not k.is_contiguous() and not r.is_contiguous()
    assert torch.equal(run("triton", q, k, r), run("triton", query, key, rows))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("B, R", [(0, 2), (2, 0)])
def test_empty(backend, B, R, device):
    query, key, rows, _ = slow.inputs(B=2, R=2, device=device)
    out = run(backend, query[:B], key[:B], rows[:B, :R])
    assert out.shape == (B, 4, R) and out.dtype == torch.float32


@pytest.mark.parametrize("rotated", [False, True])
def test_schema_and_fake_agree(rotated, device):
    query, key, rows, _ = slow.inputs(device=device)
    rope = slow.rope(device=device) if rotated else None
    scoring = Scoring.checked(query, key, rows=rows, columns=rows, scale=0.2, rope=rope)
    opcheck(torch.ops.vlmprune.row_lse.default, tuple(scoring))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nan_in_a_visible_key_is_nan(backend, device):
    query, key, rows, _ = slow.inputs(B=1, device=device)
    key[0, 0, 4, 0] = float("nan")
    out = run(backend, query, key, rows)
    assert out[0, :2].isnan().all() and out[0, 2:].isfinite().all()


def test_rows_out_of_range_are_padding_to_the_kernel(device):
    """On the CPU they are refused (below); a GPU cannot look without waiting, so its kernel must not read there."""
    from vlmprune.triton_kernels.row_lse import row_lse

    query, key, rows, _ = slow.inputs(device=device)
    strange = rows.clone()
    strange[:, 0] = torch.tensor([7, 21])
    plain = rows.clone()
    plain[:, 0] = -1
    out, expected = (
        row_lse(Scoring.checked(query, key, rows=r, columns=r, scale=0.2)) for r in (strange, plain)
    )
    assert torch.equal(out, expected)


def bad(**changes):
    query, key, rows, _ = slow.inputs()
    args = dict(query=query, key=key, rows=rows)
    return {**args, **{name: change(args) for name, change in changes.items()}}


ERRORS = [
    (dict(query=lambda a: a["query"][0]), r"^query: expected rank 4 \[B, H, Sq, D\], got \(4, 13, 24\)$"),
    (
        dict(query=lambda a: a["query"].double()),
        r"^query: expected float32, float16 or bfloat16, got torch\.float64$",
    ),
    (dict(query=lambda a: torch.zeros(2, 4, 1, 264)), r"^query: expected a head dim of 1 to 256, got 264$"),
    (
        dict(query=lambda a: a["query"].transpose(2, 3).contiguous().transpose(2, 3)),
        r"^query: expected a contiguous last dim, got strides",
    ),
    (
        dict(key=lambda a: a["key"].half()),
        r"^key: expected the dtype of query, torch\.float32, got torch\.float16$",
    ),
    (dict(key=lambda a: a["key"][:1]), r"^key: expected \[2, Hkv, S, 24\], got \(1, 2, 21, 24\)$"),
    (
        dict(key=lambda a: torch.zeros(2, 3, 21, 24)),
        r"^key: expected Hkv that divides the 4 query heads, got 3$",
    ),
    (dict(key=lambda a: a["key"][:, :, :12]), r"^key: expected at least the 13 positions of query, got 12$"),
    (dict(key=lambda a: a["key"].to("meta")), r"^key: expected the device of query, cpu, got meta$"),
    (dict(rows=lambda a: a["rows"].int()), r"^rows: expected int64, got torch\.int32$"),
    (dict(rows=lambda a: a["rows"][0]), r"^rows: expected \[2, R\], got \(5,\)$"),
    (
        dict(rows=lambda a: torch.full((2, 5), 7)),
        r"^rows: expected positions in \[8, 21\) or -1, got 7$",
    ),
    (dict(key_mask=lambda a: torch.ones(2, 21)), r"^key_mask: expected bool, got torch\.float32$"),
    (dict(key_mask=lambda a: torch.ones(2, 20) > 0), r"^key_mask: expected \[2, 21\], got \(2, 20\)$"),
    (dict(rope=lambda a: torch.ones(3)), r"^rope: expected a pair \(cos, sin\), got Tensor$"),
    (
        dict(rope=lambda a: (torch.ones(1, 21, 24), torch.ones(1, 20, 24))),
        r"^rope: expected sin \[2 or 1, 21, 24\], got \(1, 20, 24\)$",
    ),
    (
        dict(rope=lambda a: (torch.ones(1, 21, 24).long(),) * 2),
        r"^rope: expected cos in float32, float16 or bfloat16, got torch\.int64$",
    ),
]


@pytest.mark.parametrize("changes, message", ERRORS)
def test_error_text(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.row_lse(**bad(**changes))


def test_the_rows_are_looked_at_once(monkeypatch):
    """They stand in for the columns, which nobody reads."""
    query, key, rows, _ = slow.inputs()
    looked, check_range = [], scoring.check_range
    monkeypatch.setattr(
        scoring, "check_range", lambda arg, *args: (looked.append(arg), check_range(arg, *args))
    )
    ops.row_lse(query, key, rows)
    assert looked == ["rows"]
