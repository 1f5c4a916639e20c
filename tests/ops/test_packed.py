"""Packed batches: every score op against itself on each sample alone, for both backends, then edges and error text."""

import pytest
import torch
from torch.library import opcheck

from vlmprune import ops
from vlmprune.ops.scoring import Scoring
from vlmprune.ops.selection import Selection

BACKENDS = ["reference", "triton"]


def under(backend, op, *args, **kwargs):
    with ops.use_backend(backend):
        return getattr(ops, op)(*args, **kwargs)


class Batch:
    """Samples of 21, 0 and 13 positions end to end, the last queries of each, and a padded list of rows and columns."""

    def __init__(
        self, device, lengths=(21, 0, 13), lengths_q=(21, 0, 13), dtype=torch.int32, B=3, R=4, N=9, D=16
    ):
        g = torch.Generator().manual_seed(0)
        self.lengths, self.lengths_q = lengths, lengths_q
        ends, ends_q = (torch.tensor([0, *x]).cumsum(0).to(dtype) for x in (lengths, lengths_q))
        self.query = torch.randn(1, 4, sum(lengths_q), D, generator=g).to(device)
        self.key = torch.randn(1, 2, sum(lengths), D, generator=g).to(device)
        self.rope = tuple(
            torch.randn(1, sum(lengths), D, generator=g).abs().add(0.5).to(device) for _ in range(2)
        )
        self.rows, self.columns = torch.full((B, R), -1), torch.full((B, N), -1)
        for b, (n, n_q) in enumerate(zip(lengths, lengths_q, strict=True)):
            picked = torch.randperm(n_q, generator=g)[: R - b].sort().values + n - n_q
            self.rows[b, : len(picked)] = picked
            picked = torch.randperm(n, generator=g)[: N - b].sort().values
            self.columns[b, : len(picked)] = picked
        self.rows, self.columns = self.rows.to(device), self.columns.to(device)
        self.seqs = dict(cu_seqlens=ends.to(device))
        if lengths_q != lengths:
            self.seqs["cu_seqlens_q"] = ends_q.to(device)

    def sample(self, x, b, queries=False):
        """The part of ``x [1, ..., total, D]`` that is sample b's."""
        lengths = self.lengths_q if queries else self.lengths
        return x.narrow(-2, sum(lengths[:b]), lengths[b])

    def samples(self):
        """(b, query, key, rows, columns, rope) of each sample that is not empty."""
        for b, n in enumerate(self.lengths):
            if n:
                rope = tuple(self.sample(t, b) for t in self.rope)
                lists = self.rows[b : b + 1], self.columns[b : b + 1]
                yield b, self.sample(self.query, b, True), self.sample(self.key, b), *lists, rope


SHAPES = [
    dict(),
    dict(lengths_q=(5, 0, 4)),
    dict(lengths=(13, 70, 21), lengths_q=(13, 70, 21), dtype=torch.int64),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=["queries as keys", "last queries", "int64"])
@pytest.mark.parametrize("rotated, causal", [(False, True), (True, False)])
def test_scores_are_those_of_each_sample_alone(backend, shape, rotated, causal, device):
    batch = Batch(device, **shape)
    for normalize, reduces in (
        ("row", ("mean", "mean")),
        ("columns", ("max", "sum")),
        ("none", ("none", "max")),
    ):
        settings = dict(normalize=normalize, head_reduce=reduces[0], row_reduce=reduces[1], causal=causal)
        lists = dict(rows=batch.rows, columns=batch.columns)
        rope = batch.rope if rotated else None
        out = under(
            backend,
            "received_attention",
            batch.query,
            batch.key,
            **lists,
            **settings,
            rope=rope,
            **batch.seqs,
        )
        expected = torch.zeros_like(out)
        for b, query, key, rows, columns, tables in batch.samples():
            one = dict(rows=rows, columns=columns, rope=tables if rotated else None)
            expected[b] = under(backend, "received_attention", query, key, **one, **settings)[0]
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("longest", [None, 30])
def test_row_lse_is_that_of_each_sample_alone(backend, shape, longest, device):
    batch = Batch(device, **shape)
    out = under(backend, "row_lse", batch.query, batch.key, batch.rows, **batch.seqs, max_seqlen=longest)
    for b, query, key, rows, _, _ in batch.samples():
        alone = under(backend, "row_lse", query, key, rows)[0]
        torch.testing.assert_close(out[b], alone, rtol=1e-5, atol=1e-5)
    assert out[1].eq(float("-inf")).all()


def test_row_lse_splits_long_packed_samples(device):
    batch = Batch(device, lengths=(900, 300), lengths_q=(900, 300), B=2, D=8)
    out, expected = (
        under(b, "row_lse", batch.query, batch.key, batch.rows, **batch.seqs) for b in BACKENDS[::-1]
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_of_flash_attention_varlen(backend, device):
    batch = Batch(device, lengths_q=(5, 0, 4))
    lists = dict(rows=batch.rows, columns=batch.columns)
    every = torch.full((3, 5), -1, device=device)
    every[0], every[2, :4] = torch.arange(16, 21), torch.arange(9, 13)
    packed = under(backend, "row_lse", batch.query, batch.key, every, **batch.seqs)
    lse = torch.cat([packed[0], packed[2, :, :4]], dim=1)  # [H, total_q]
    plain = under(backend, "received_attention", batch.query, batch.key, **lists, **batch.seqs)
    for given in (lse, lse[None], lse.mT.contiguous().mT):
        out = under(backend, "received_attention", batch.query, batch.key, **lists, **batch.seqs, lse=given)
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [0, 3, 9, [5, 1, 2]])
def test_pruned_samples_lie_end_to_end(backend, shape, keep, device):
    """Whether or not the longest sample is known."""
    batch = Batch(device, **shape)
    keep = torch.tensor(keep, device=device) if isinstance(keep, list) else keep
    total = sum(batch.lengths)
    tensors = [batch.key, torch.arange(total, device=device)[None]]
    lists = dict(rows=batch.rows, columns=batch.columns, keep=keep)
    call = dict(**lists, **batch.seqs)
    out = under(backend, "prune_tokens", batch.query, batch.key, tensors, **call)
    bounded = under(
        backend, "prune_tokens", batch.query, batch.key, tensors, **call, max_seqlen=min(70, total)
    )
    assert torch.equal(out.index, bounded.index) and torch.equal(out.cu_seqlens, bounded.cu_seqlens)
    assert all(map(torch.equal, out.tensors, bounded.tensors))
    expected, ends = [], [0, 0, 0, 0]
    for b in range(3):
        ends[b + 1] = ends[b]
        for i, query, key, rows, columns, _ in batch.samples():
            if i == b:
                n = keep if isinstance(keep, int) else keep[b : b + 1]
                alone = under(
                    backend,
                    "prune_tokens",
                    query,
                    key,
                    [key],
                    rows=rows,
                    columns=columns,
                    keep=n,
                    width=batch.lengths[b],
                )
                kept = alone.index[0][alone.index[0] >= 0]
                expected += (kept + sum(batch.lengths[:b])).tolist()
                ends[b + 1] += len(kept)
                assert out.count[b] == len(kept)
    assert out.index.tolist() == [expected + [-1] * (total - len(expected))]
    assert out.cu_seqlens.tolist() == ends and out.cu_seqlens.dtype == batch.seqs["cu_seqlens"].dtype
    assert torch.equal(out.tensors[1][0, : len(expected)], out.index[0, : len(expected)])
    assert torch.equal(out.tensors[0][:, :, : len(expected)], batch.key[:, :, expected])
    assert out.tensors[0][:, :, len(expected) :].eq(0).all()


SEGMENTS = torch.tensor(
    [[3, 0, 5], [4, 4, 1], [2, 1, 3]]
)  # of 9 columns, but of the last 9 and 6, two stay out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [0, 2, [[1, 2, 9], [1, 0, 3], [-1, 1, 2]]])
@pytest.mark.parametrize("width", [None, 17])
def test_segments_of_packed_samples(backend, shape, keep, width, device):
    """Each sample as alone; ``columns`` are positions in the packed outputs."""
    batch = Batch(device, **shape)
    how = dict(keep=keep, segments=SEGMENTS.to(device), newest=True)
    if isinstance(keep, list):
        how["keep"] = torch.tensor(keep, device=device)
    lists = dict(rows=batch.rows, columns=batch.columns)
    out = under(
        backend,
        "prune_tokens",
        batch.query,
        batch.key,
        [batch.key],
        **lists,
        **how,
        **batch.seqs,
        width=width,
    )
    index, ends = [], [0]
    for b, length in enumerate(batch.lengths):
        own = slice(b, b + 1)
        lists = dict(columns=batch.columns[own], segments=how["segments"][own], newest=True)
        n = keep if isinstance(keep, int) else how["keep"][own]
        alone = under(backend, "prune_scored", out.scores[own], [], **lists, keep=n, length=max(length, 9))
        kept = [p for p in alone.index[0].tolist() if 0 <= p < length]
        at = [-1 if c < 0 else c + ends[b] for c in alone.columns[0].tolist()]
        assert out.count[b] == len(kept) and torch.equal(out.kept[own], alone.kept)
        assert out.columns[b].tolist() == [-1 if width is not None and c >= width else c for c in at]
        index += [p + sum(batch.lengths[:b]) for p in kept]
        ends.append(ends[b] + len(kept))
    M = sum(batch.lengths) if width is None else width
    assert out.cu_seqlens.tolist() == ends
    assert out.index.tolist() == [(index + [-1] * (M - len(index)))[:M]]


@pytest.mark.parametrize("normalize", ["row", "columns"])
def test_a_sample_has_the_same_bits_alone(normalize, device):
    """Beside longer ones, packed or padded: neither splits nor sums depend on the batch."""
    batch = Batch(device, lengths=(700, 21, 1300), lengths_q=(700, 21, 1300), D=8)
    lists = dict(rows=batch.rows, columns=batch.columns)
    how = dict(keep=3, normalize=normalize)
    packed = under("triton", "prune_tokens", batch.query, batch.key, [], **lists, **how, **batch.seqs)
    lse = under("triton", "row_lse", batch.query, batch.key, batch.rows, **batch.seqs)
    for b, query, key, rows, columns, _ in batch.samples():
        alone = under("triton", "prune_tokens", query, key, [], rows=rows, columns=columns, **how)
        assert torch.equal(packed.scores[b], alone.scores[0]) and torch.equal(packed.kept[b], alone.kept[0])
        assert torch.equal(lse[b], under("triton", "row_lse", query, key, rows)[0])
    query, key = (torch.cat([x, x.flip(2), -x]) for x in (batch.query[:, :, :1300], batch.key[:, :, :1300]))
    together = under("triton", "prune_tokens", query, key, [], **lists, **how)
    for b in range(3):
        own = slice(b, b + 1)
        lists = dict(rows=batch.rows[own], columns=batch.columns[own])
        alone = under("triton", "prune_tokens", query[own], key[own], [], **lists, **how)
        assert torch.equal(together.scores[own], alone.scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrow_output_cuts_the_last_sample(backend, device):
    batch = Batch(device)
    lists = dict(rows=batch.rows, columns=batch.columns, keep=2)
    whole = under(backend, "prune_tokens", batch.query, batch.key, [batch.key], **lists, **batch.seqs)
    total = int(whole.cu_seqlens[-1])
    for width in (0, 5, total - 3, total, total + 2):
        out = under(
            backend, "prune_tokens", batch.query, batch.key, [batch.key], **lists, **batch.seqs, width=width
        )
        assert torch.equal(out.index, whole.index[:, :width]) and torch.equal(out.count, whole.count)
        assert torch.equal(out.cu_seqlens, whole.cu_seqlens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples(backend, device):
    batch = Batch(device, lengths=(), lengths_q=(), B=0)
    lists = dict(rows=batch.rows, columns=batch.columns[:, :0])
    assert under(backend, "received_attention", batch.query, batch.key, **lists, **batch.seqs).shape == (0, 0)
    out = under(backend, "prune_tokens", batch.query, batch.key, [batch.key], keep=0, **lists, **batch.seqs)
    assert out.index.shape == (1, 0) and out.count.shape == (0,) and out.cu_seqlens.tolist() == [0]


def test_schemas_and_fakes_agree(device):
    batch = Batch(device, lengths_q=(5, 0, 4))
    lists = dict(rows=batch.rows, columns=batch.columns)
    scoring = Scoring.checked(batch.query, batch.key, **lists, **batch.seqs, max_seqlen=21)
    for op in (torch.ops.vlmprune.received_attention.default, torch.ops.vlmprune.row_lse.default):
        opcheck(op, tuple(scoring))
    selection = Selection.checked(
        batch.query, *batch.columns.shape, batch.key.shape[2], True, keep=3, width=20
    )
    opcheck(torch.ops.vlmprune.prune_tokens.default, ([batch.key], *selection, *scoring))


ERRORS = [
    (
        dict(cu_seqlens=torch.tensor([0.0, 34.0])),
        r"^cu_seqlens: expected int32 or int64, got torch\.float32$",
    ),
    (dict(cu_seqlens=torch.tensor([[0, 34]])), r"^cu_seqlens: expected \[B \+ 1\], got \(1, 2\)$"),
    (dict(cu_seqlens=torch.tensor([0, 21, 34])), r"^rows: expected \[2, R\], got \(3, 4\)$"),
    (
        dict(cu_seqlens=torch.tensor([0, 21, 20, 34])),
        r"^cu_seqlens: expected a rise from 0 to at most 34, got \[0, 21, 20, 34\]$",
    ),
    (
        dict(cu_seqlens=torch.tensor([0, 21, 21, 35])),
        r"^cu_seqlens: expected a rise from 0 to at most 34, got ",
    ),
    (dict(cu_seqlens_q=torch.tensor([0, 34])), r"^cu_seqlens_q: expected \[4\], got \(2,\)$"),
    (
        dict(cu_seqlens_q=torch.tensor([0, 10, 21, 34])),
        r"^cu_seqlens_q: expected no sample longer than in cu_seqlens, got \[0, 10, 21, 34\]$",
    ),
    (
        dict(cu_seqlens=None, cu_seqlens_q=torch.tensor([0, 34])),
        r"^cu_seqlens_q: expected None without cu_seqlens, got a tensor$",
    ),
    (dict(cu_seqlens=None, max_seqlen=4), r"^max_seqlen: expected None without cu_seqlens, got 4$"),
    (dict(max_seqlen=35), r"^max_seqlen: expected a whole number in 0\.\.34, got 35$"),
    (dict(max_seqlen=20), r"^max_seqlen: expected at least 21, got 20$"),
    (
        dict(key_mask=torch.ones(1, 34) > 0),
        r"^key_mask: expected None with cu_seqlens \(a packed batch has no padding\), got a tensor$",
    ),
    (
        dict(query=torch.zeros(2, 4, 34, 16), key=torch.zeros(2, 2, 34, 16)),
        r"^query: expected a first dim of 1 with cu_seqlens, got ",
    ),
    (
        dict(query=torch.zeros(1, 4, 30, 16)),
        r"^query: expected as many positions as key without cu_seqlens_q, got 30$",
    ),
    (
        dict(columns=torch.tensor([[20], [-1], [13]])),
        r"^columns: expected positions in \[0, 13\) or -1, got 13$",
    ),
    (
        dict(columns=torch.tensor([[20], [0], [12]])),
        r"^columns: expected positions in \[0, 0\) or -1, got 0$",
    ),
    (dict(lse=torch.zeros(4, 33)), r"^lse: expected \[1, 4, 34\], got \(1, 4, 33\)$"),
]


@pytest.mark.parametrize("changes, message", ERRORS)
def test_error_text(changes, message):
    batch = Batch("cpu")
    args = (
        dict(query=batch.query, key=batch.key, rows=batch.rows, columns=batch.columns, **batch.seqs) | changes
    )
    with pytest.raises(ValueError, match=message):
        ops.received_attention(args.pop("query"), args.pop("key"), **args)
