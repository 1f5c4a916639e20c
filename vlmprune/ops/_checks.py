"""Argument checks that several ops share. Each raises ValueError naming the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.errors import check

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
Rope = tuple[Tensor, Tensor]


def check_query_key(query: Tensor, key: Tensor) -> None:
    """``query [B, H, Sq, D]`` and ``key [B, Hkv, S, D]``: one dtype and device, H a multiple of Hkv, Sq <= S."""
    check(query.ndim == 4, "query", "rank 4 [B, H, Sq, D]", tuple(query.shape))
    check(query.dtype in FLOATS, "query", "float32, float16 or bfloat16", query.dtype)
    B, H, Sq, D = query.shape
    check(1 <= D <= MAX_HEAD_DIM, "query", f"a head dim of 1 to {MAX_HEAD_DIM}", D)
    check_last_dim("query", query)
    check(key.ndim == 4, "key", "rank 4 [B, Hkv, S, D]", tuple(key.shape))
    check(key.dtype == query.dtype, "key", f"the dtype of query, {query.dtype}", key.dtype)
    check(key.device == query.device, "key", f"the device of query, {query.device}", key.device)
    check(key.shape[0] == B and key.shape[3] == D, "key", f"[{B}, Hkv, S, {D}]", tuple(key.shape))
    check(
        key.shape[1] > 0 and H % key.shape[1] == 0,
        "key",
        f"Hkv that divides the {H} query heads",
        key.shape[1],
    )
    check(key.shape[2] >= Sq, "key", f"at least the {Sq} positions of query", key.shape[2])
    check_last_dim("key", key)


def check_last_dim(arg: str, x: Tensor) -> None:
    """The elements of a row lie side by side."""
    check(x.shape[-1] <= 1 or x.stride(-1) == 1, arg, "a contiguous last dim", f"strides {tuple(x.stride())}")


def check_positions(arg: str, x: Tensor, B: int, like: Tensor, letter: str) -> None:
    """An int64 list ``[B, n]`` on the device of ``like``."""
    check(x.dtype == torch.int64, arg, "int64", x.dtype)
    check(x.ndim == 2 and x.shape[0] == B, arg, f"[{B}, {letter}]", tuple(x.shape))
    check(x.device == like.device, arg, f"the device {like.device}", x.device)


def check_key_mask(key_mask: Tensor | None, key: Tensor) -> None:
    """A bool mask ``[B, S]``, or None."""
    if key_mask is not None:
        check(key_mask.dtype == torch.bool, "key_mask", "bool", key_mask.dtype)
        check_shape("key_mask", key_mask, (key.shape[0], key.shape[2]))
        check(key_mask.device == key.device, "key_mask", f"the device {key.device}", key_mask.device)


def check_packed(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen: int | None,
) -> int:
    """The bounds of a packed batch, or None for all three; returns how many samples there are."""
    if cu_seqlens is None:
        check(cu_seqlens_q is None, "cu_seqlens_q", "None without cu_seqlens", "a tensor")
        check(max_seqlen is None, "max_seqlen", "None without cu_seqlens", max_seqlen)
        return query.shape[0]
    for arg, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_q", cu_seqlens_q)):
        if x is not None:
            check(x.dtype in (torch.int32, torch.int64), arg, "int32 or int64", x.dtype)
            fits = x.ndim == 1 and x.shape[0] >= 1 and x.shape == cu_seqlens.shape
            check(fits, arg, "[B + 1]" if x is cu_seqlens else str(list(cu_seqlens.shape)), tuple(x.shape))
            check(x.device == query.device, arg, f"the device {query.device}", x.device)
    check(query.shape[0] == 1, "query", "a first dim of 1 with cu_seqlens", tuple(query.shape))
    check(key_mask is None, "key_mask", "None with cu_seqlens (a packed batch has no padding)", "a tensor")
    if cu_seqlens_q is None:
        check(
            query.shape[2] == key.shape[2],
            "query",
            "as many positions as key without cu_seqlens_q",
            query.shape[2],
        )
    if max_seqlen is not None:
        check_count("max_seqlen", max_seqlen, key.shape[2])
    return cu_seqlens.shape[0] - 1


def check_values(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen: int | None,
) -> None:
    """Positions and bounds of CPU tensors lie where they may. A kernel masks what does not: looking would wait for it."""
    if rows.device.type != "cpu":
        return
    Sq, S = query.shape[2], key.shape[2]
    first, end = torch.full((1, 1), S - Sq), torch.full((1, 1), S)
    if cu_seqlens is not None:
        starts_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
        for arg, x, total in (("cu_seqlens", cu_seqlens, S), ("cu_seqlens_q", starts_q, Sq)):
            ok = x[0] == 0 and x[-1] <= total and bool((x.diff() >= 0).all())
            check(bool(ok), arg, f"a rise from 0 to at most {total}", x.tolist())
        end = cu_seqlens.diff()[:, None]
        first = end - starts_q.diff()[:, None]
        check(
            bool((first >= 0).all()), "cu_seqlens_q", "no sample longer than in cu_seqlens", starts_q.tolist()
        )
        longest = int(end.max()) if len(end) else 0
        check(max_seqlen is None or longest <= max_seqlen, "max_seqlen", f"at least {longest}", max_seqlen)
    check_range("rows", rows, first, end)
    if columns is not None:
        check_range("columns", columns, torch.zeros_like(end), end)


def check_range(arg: str, x: Tensor, first: Tensor, end: Tensor) -> None:
    """Each entry of ``x [B, n]`` is -1 or in ``[first, end)`` of its sample, both ``[B or 1, 1]``."""
    bad = (x != -1) & ((x < first) | (x >= end))
    if bool(bad.any()):
        b, i = bad.nonzero()[0].tolist()
        low, high = (int(t[b if len(t) > 1 else 0, 0]) for t in (first, end))
        check(False, arg, f"positions in [{low}, {high}) or -1", int(x[b, i]))


def check_reach(index: Tensor, tensors: Sequence[Tensor]) -> None:
    """Each entry of an index on the CPU is a row of every tensor, or -1; kernels mask others: looking would wait for them."""
    if index.device.type == "cpu" and tensors:
        S = min(map(seq_len, tensors))
        check_range("index", index, torch.zeros(1, 1), torch.full((1, 1), S))


def check_lse(lse: Tensor | None, query: Tensor, normalize: str, rope: Rope | None) -> None:
    """A float32 ``[B, H, Sq]`` of the rotated scores, of use only to normalize="row"; or None."""
    if lse is not None:
        check(lse.dtype == torch.float32, "lse", "float32", lse.dtype)
        check_shape("lse", lse, tuple(query.shape[:3]))
        check(lse.device == query.device, "lse", f"the device {query.device}", lse.device)
        check(
            normalize == "row",
            "lse",
            "None unless normalize is 'row'",
            f"a tensor with normalize={normalize!r}",
        )
        check(rope is None, "lse", "None with rope (it belongs to the rotated scores)", "a tensor")


def check_row_weight(row_weight: Tensor | None, rows: Tensor) -> None:
    """Floats ``[B, R]``, or None."""
    if row_weight is not None:
        check(row_weight.dtype in FLOATS, "row_weight", "float32, float16 or bfloat16", row_weight.dtype)
        check_shape("row_weight", row_weight, tuple(rows.shape))
        check(row_weight.device == rows.device, "row_weight", f"the device {rows.device}", row_weight.device)


def check_rope(rope: Rope | None, key: Tensor) -> None:
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


def check_tensors(tensors: Sequence[Tensor], B: int, device: torch.device, S: int | None = None) -> None:
    """Tensors ``[B or 1, S]``, ``[B or 1, S, D]`` or ``[B or 1, H, S, D]`` on one device; of length S if that is given."""
    check(isinstance(tensors, list | tuple), "tensors", "a list or tuple of tensors", type(tensors).__name__)
    for i, x in enumerate(tensors):
        arg = f"tensors[{i}]"
        check(isinstance(x, Tensor), arg, "a tensor", type(x).__name__)
        check(x.ndim in (2, 3, 4), arg, "rank 2 [B, S], 3 [B, S, D] or 4 [B, H, S, D]", tuple(x.shape))
        check(x.element_size() <= 8, arg, "a dtype of at most 8 bytes", x.dtype)
        check(x.shape[0] == 1 or x.shape[0] == B, arg, f"a first dim of {B} or 1", tuple(x.shape))
        check(S is None or seq_len(x) == S, arg, f"{S} positions", tuple(x.shape))
        if x.ndim > 2:
            check_last_dim(arg, x)
        check(x.device == device, arg, f"the device {device}", x.device)


def seq_len(x: Tensor) -> int:
    """Length of the sequence dim: 1 for rank 2 and 3, 2 for rank 4."""
    return x.shape[2] if x.ndim == 4 else x.shape[1]


def check_shape(arg: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Exactly this shape."""
    check(tuple(x.shape) == shape, arg, str(list(shape)), tuple(x.shape))


def check_choice(arg: str, got: str, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    check(got in choices, arg, f"one of {', '.join(choices)}", repr(got))


def check_quota(keep: object, B: int, most: int, device: torch.device) -> None:
    """How many to keep: a whole number in 0..most, or ``[B]`` int64."""
    if isinstance(keep, Tensor):
        check(keep.dtype == torch.int64, "keep", "int64", keep.dtype)
        check_shape("keep", keep, (B,))
        check(keep.device == device, "keep", f"the device {device}", keep.device)
    else:
        check_count("keep", keep, most)


def check_count(arg: str, got: object, most: int) -> None:
    """A whole number in 0..most."""
    ok = isinstance(got, int | torch.SymInt) and not isinstance(got, bool)
    check(ok and 0 <= got <= most, arg, f"a whole number in 0..{most}", repr(got))  # type: ignore[operator]
