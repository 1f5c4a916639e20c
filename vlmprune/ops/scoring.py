"""What is scored and how: one object, checked once, which the reference, the custom ops and the kernels take whole.

A new argument of scoring is a key of ``ScoringKeywords``, a field of ``Scoring`` and its check, all in this file.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Required, TypedDict, Unpack

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops._checks import (
    FLOATS,
    check_choice,
    check_count,
    check_device,
    check_dtype,
    check_last_dim,
    check_range,
    check_tensor,
)

MAX_HEAD_DIM = 256
HEAD_REDUCES = ("mean", "max", "sum", "none")
ROW_REDUCES = ("mean", "max", "sum")
NORMALIZES = ("row", "columns", "none")
Rope = tuple[Tensor, Tensor]


class ReductionKeywords(TypedDict, total=False):
    """How logits become one score a column: see ``received_attention``."""

    row_weight: Tensor | None
    pair_weight: Tensor | None
    head_reduce: str
    top_heads: int | None
    row_reduce: str
    normalize: str


class ScoringKeywords(ReductionKeywords, total=False):
    """The keywords of every op that scores: see ``received_attention``, which describes them."""

    rows: Required[Tensor]
    columns: Required[Tensor]
    key_mask: Tensor | None
    causal: bool
    lse: Tensor | None
    scale: float | None
    rope: Rope | None
    cu_seqlens: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen: int | None


class Scoring(NamedTuple):
    """Query, key and the keywords, defaults filled in. A custom op takes it as ``*scoring``."""

    query: Tensor
    key: Tensor
    rows: Tensor
    columns: Tensor
    scale: float
    key_mask: Tensor | None = None
    causal: bool = True
    lse: Tensor | None = None
    row_weight: Tensor | None = None
    pair_weight: Tensor | None = None
    head_reduce: str = "mean"
    top_heads: int | None = None
    row_reduce: str = "mean"
    normalize: str = "row"
    cos: Tensor | None = None
    sin: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    max_seqlen: int | None = None

    def keywords(self) -> dict[str, Any]:
        """What an op that scores is called with for this, query and key included."""
        fields = self._asdict()
        cos, sin = fields.pop("cos"), fields.pop("sin")
        return fields if cos is None else fields | {"rope": (cos, sin)}

    @classmethod
    def checked(cls, query: Tensor, key: Tensor, **given: Unpack[ScoringKeywords]) -> Scoring:
        """Check the arguments of a call, all but the entries of tensors (``check_values``)."""
        _check_query_key(query, key)
        fields: dict[str, Any] = {**given}
        rope = fields.pop("rope", None)
        _check_rope(rope, key)
        cos, sin = (None, None) if rope is None else rope
        if fields.get("scale") is None:
            fields["scale"] = query.shape[-1] ** -0.5
        s = cls(query, key, **fields, cos=cos, sin=sin)
        _check_packed(s)
        B = query.shape[0] if s.cu_seqlens is None else s.cu_seqlens.shape[0] - 1
        check_tensor("rows", s.rows, [torch.int64], (B, "R"), query)
        check_tensor("columns", s.columns, [torch.int64], (B, "N"), query)
        check_tensor("key_mask", s.key_mask, [torch.bool], (key.shape[0], key.shape[2]), key)
        _check_lse(s)
        check_tensor("row_weight", s.row_weight, FLOATS, s.rows.shape, query)
        pairs = (*s.rows.shape, s.columns.shape[1])
        check_tensor("pair_weight", s.pair_weight, [torch.float32], pairs, query)
        check_choice("head_reduce", s.head_reduce, HEAD_REDUCES)
        check_choice("row_reduce", s.row_reduce, ROW_REDUCES)
        check_choice("normalize", s.normalize, NORMALIZES)
        return s if s.top_heads is None else s._replace(top_heads=_fewer_heads(s, s.top_heads))

    def check_values(self) -> None:
        """Positions and bounds of CPU tensors lie where they may. A kernel masks what does not: looking would wait for it."""
        if self.rows.device.type != "cpu":
            return
        Sq, S = self.query.shape[2], self.key.shape[2]
        first, end = torch.full((1, 1), S - Sq), torch.full((1, 1), S)
        if self.cu_seqlens is not None:
            first, end = _spans(self.cu_seqlens, self.cu_seqlens_q, S, Sq)
            longest = int(end.max()) if len(end) else 0
            fits = self.max_seqlen is None or longest <= self.max_seqlen
            check(fits, "max_seqlen", f"at least {longest}", self.max_seqlen)
        check_range("rows", self.rows, first, end)
        if self.columns is not self.rows:  # as in row_lse
            check_range("columns", self.columns, torch.zeros_like(end), end)


class Scored(NamedTuple):
    """Scores that are there already, defaults filled in: what ``Scoring`` is where they are not."""

    scores: Tensor
    columns: Tensor
    key_mask: Tensor | None
    length: int

    def keywords(self) -> dict[str, Any]:
        """What ``prune_scored`` is called with for this."""
        return self._asdict()


def _check_query_key(query: Tensor, key: Tensor) -> None:
    """``query [B, H, Sq, D]`` and ``key [B, Hkv, S, D]``: one dtype and device, H a multiple of Hkv, Sq <= S."""
    check(query.ndim == 4, "query", "rank 4 [B, H, Sq, D]", tuple(query.shape))
    check_dtype("query", query, *FLOATS)
    B, H, Sq, D = query.shape
    check(1 <= D <= MAX_HEAD_DIM, "query", f"a head dim of 1 to {MAX_HEAD_DIM}", D)
    check_last_dim("query", query)
    check(key.ndim == 4, "key", "rank 4 [B, Hkv, S, D]", tuple(key.shape))
    check(key.dtype == query.dtype, "key", f"the dtype of query, {query.dtype}", key.dtype)
    check(key.device == query.device, "key", f"the device of query, {query.device}", key.device)
    check(key.shape[0] == B and key.shape[3] == D, "key", f"[{B}, Hkv, S, {D}]", tuple(key.shape))
    divides = key.shape[1] > 0 and H % key.shape[1] == 0
    check(divides, "key", f"Hkv that divides the {H} query heads", key.shape[1])
    check(key.shape[2] >= Sq, "key", f"at least the {Sq} positions of query", key.shape[2])
    check_last_dim("key", key)


def _check_packed(s: Scoring) -> None:
    """The bounds of a packed batch, or None for all three."""
    if s.cu_seqlens is None:
        check(s.cu_seqlens_q is None, "cu_seqlens_q", "None without cu_seqlens", "a tensor")
        check(s.max_seqlen is None, "max_seqlen", "None without cu_seqlens", s.max_seqlen)
        return
    for arg, x in (("cu_seqlens", s.cu_seqlens), ("cu_seqlens_q", s.cu_seqlens_q)):
        if x is not None:
            check_dtype(arg, x, torch.int32, torch.int64)
            fits = x.ndim == 1 and x.shape[0] >= 1 and x.shape == s.cu_seqlens.shape
            expected = "[B + 1]" if x is s.cu_seqlens else str(list(s.cu_seqlens.shape))
            check(fits, arg, expected, tuple(x.shape))
            check_device(arg, x, s.query.device)
    check(s.query.shape[0] == 1, "query", "a first dim of 1 with cu_seqlens", tuple(s.query.shape))
    check(s.key_mask is None, "key_mask", "None with cu_seqlens (a packed batch has no padding)", "a tensor")
    Sq, S = s.query.shape[2], s.key.shape[2]
    fits = s.cu_seqlens_q is not None or Sq == S
    check(fits, "query", "as many positions as key without cu_seqlens_q", Sq)
    if s.max_seqlen is not None:
        check_count("max_seqlen", s.max_seqlen, S)


def _spans(cu_seqlens: Tensor, cu_seqlens_q: Tensor | None, S: int, Sq: int) -> tuple[Tensor, Tensor]:
    """Where the queries of each sample begin and where it ends, both ``[B, 1]``, of bounds that are right."""
    starts_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    for arg, x, total in (("cu_seqlens", cu_seqlens, S), ("cu_seqlens_q", starts_q, Sq)):
        ok = x[0] == 0 and x[-1] <= total and bool((x.diff() >= 0).all())
        check(bool(ok), arg, f"a rise from 0 to at most {total}", x.tolist())
    end = cu_seqlens.diff()[:, None]
    first = end - starts_q.diff()[:, None]
    short = bool((first >= 0).all())
    check(short, "cu_seqlens_q", "no sample longer than in cu_seqlens", starts_q.tolist())
    return first, end


def _fewer_heads(s: Scoring, top_heads: int) -> int | None:
    """How many heads are joined, once that is checked; None where it is all of them."""
    check_count("top_heads", top_heads, least=1)
    check(
        s.head_reduce != "none", "top_heads", "None with head_reduce='none', which joins no heads", top_heads
    )
    return top_heads if top_heads < s.query.shape[1] else None


def _check_lse(s: Scoring) -> None:
    """A float32 ``[B, H, Sq]`` of the rotated scores, of use only to normalize="row"; or None.

    FlashAttention's variable-length calls return ``[H, total_q]``.
    """
    if s.lse is None:
        return
    lse = s.lse[None] if s.cu_seqlens is not None and s.lse.ndim == 2 else s.lse
    check_tensor("lse", lse, [torch.float32], s.query.shape[:3], s.query)
    got = f"a tensor with normalize={s.normalize!r}"
    check(s.normalize == "row", "lse", "None unless normalize is 'row'", got)
    check(s.cos is None, "lse", "None with rope (it belongs to the rotated scores)", "a tensor")


def _check_rope(rope: Rope | None, key: Tensor) -> None:
    """Two tables ``[B or 1, S, D]`` of one dtype on the device of ``key``, or None."""
    if rope is None:
        return
    check(isinstance(rope, tuple) and len(rope) == 2, "rope", "a pair (cos, sin)", type(rope).__name__)
    B, _, S, D = key.shape
    check(D % 2 == 0, "rope", "None for an odd head dim", f"tables with D={D}")
    for name, table in zip(("cos", "sin"), rope, strict=True):
        check(table.dtype in FLOATS, "rope", f"{name} in float32, float16 or bfloat16", table.dtype)
        fits = table.ndim == 3 and (table.shape[0] == 1 or table.shape[0] == B) and table.shape[1:] == (S, D)
        check(fits, "rope", f"{name} [{B} or 1, {S}, {D}]", tuple(table.shape))
        check(table.device == key.device, "rope", f"{name} on {key.device}", table.device)
    check(rope[0].shape == rope[1].shape, "rope", "cos and sin of one shape", [tuple(t.shape) for t in rope])
