"""PrunePlan: prune_tokens for one set of shapes, with every decision and allocation made before the first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops._checks import Rope
from vlmprune.ops._dispatch import Backend, choose, needs_triton, register
from vlmprune.ops.prune_tokens import Pruned, checked

ALIGNMENT = 16  # bytes; a kernel is compiled for pointers that are multiples of it, or for any
OPTIONAL = ("keep", "key_mask", "lse", "row_weight", "cos", "sin", "cu_seqlens", "cu_seqlens_q")


class _Expected(NamedTuple):
    """What a tensor of a run must have in common with the example the plan was built from."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    zero_bits: int  # of the pointer

    @classmethod
    def of(cls, name: str, x: Tensor) -> _Expected:
        """Describe an example."""
        zero_bits = ALIGNMENT - 1 if x.data_ptr() % ALIGNMENT == 0 else 0
        return cls(name, x.shape, x.stride(), x.dtype, x.device, zero_bits)

    def refuse(self, x: Tensor) -> None:
        """Raise the ValueError that says what differs."""
        check(x.shape == self.shape, self.name, f"{list(self.shape)} as in the plan", tuple(x.shape))
        check(x.dtype == self.dtype, self.name, f"{self.dtype} as in the plan", x.dtype)
        check(x.device == self.device, self.name, f"the device {self.device} as in the plan", x.device)
        check(x.stride() == self.stride, self.name, f"strides {self.stride} as in the plan", x.stride())
        where = f"memory that starts at a multiple of {ALIGNMENT} bytes as in the plan"
        check(False, self.name, where, hex(x.data_ptr()))


class PrunePlan:
    """``prune_tokens`` with workspace, outputs and compiled kernels kept: a run packs pointers and launches.

    A run allocates, compiles and waits for nothing, so it can be captured in a CUDA graph and replayed; it gives the
    bits of ``prune_tokens``, without gradients. The workspace resets itself. One plan serves one stream at a time.
    ``bind`` checks tensors once for many runs, ``run`` at every call.

    Args:
        query, key, tensors, rows, columns, keep: examples, with the keywords of ``prune_tokens`` in ``settings``; the
            plan keeps shapes, strides, dtypes, device and numbers, and no data of theirs. The kernels must be able to
            read them in place: lists, masks and weights are contiguous, cos and sin have equal strides.

    Raises:
        ValueError: as ``prune_tokens``, or an example would have to be copied at every run.
        BackendError: Triton cannot run on the device of ``query``.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        tensors: Sequence[Tensor],
        *,
        rows: Tensor,
        columns: Tensor,
        keep: int | Tensor,
        **settings: Any,
    ) -> None:
        settings |= {"rows": rows, "columns": columns, "keep": keep}
        checked(query, key, tensors, **settings)
        examples = _flat(query, key, tensors, settings)
        check(len(rows) > 0, "rows", "at least one sample", tuple(rows.shape))
        apart = _apart(examples)
        call = checked(*_nested(apart, len(tensors), settings), **settings)
        build = choose("prune_plan", query)
        self._program, (gathered, index, count, scores, ends) = build(call, list(apart.values()))
        for i, (name, x) in enumerate(examples.items()):
            read = i in self._program.used or index.numel() == 0 or x.numel() == 0
            check(read, name, "a tensor that the kernels can read in place", f"strides {x.stride()}")
        self._result = Pruned(gathered, index, count, scores, ends)
        self._optional = [name in examples for name in OPTIONAL]
        self._expected = [_Expected.of(name, x) for name, x in examples.items()]
        self._expected_out = [_Expected.of(f"out[{i}]", x) for i, x in enumerate(gathered)]
        self._own = [x.data_ptr() for x in gathered]
        self._n_tensors = len(tensors)

    def run(self, query: Tensor, key: Tensor, tensors: Sequence[Tensor], **named: Any) -> Pruned:
        """Prune these tensors: ``bind`` them and call what it returns. Arguments and errors are those of ``bind``.

        Host time grows with the number of tensors, each of which is compared with its example.
        """
        return self.bind(query, key, tensors, **named)()

    def bind(
        self,
        query: Tensor,
        key: Tensor,
        tensors: Sequence[Tensor],
        *,
        rows: Tensor,
        columns: Tensor,
        keep: Tensor | None = None,
        key_mask: Tensor | None = None,
        lse: Tensor | None = None,
        row_weight: Tensor | None = None,
        rope: Rope | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        out: Sequence[Tensor] | None = None,
    ) -> Callable[[], Pruned]:
        """Check these tensors, which are like the examples, once for many runs; ``keep`` only if it was a tensor.

        Args:
            out: where the gathered tensors go, contiguous, shaped like those the plan returns; None = the plan's own.

        Returns:
            A function that prunes what the tensors hold when it is called; it keeps them alive, and its host time does
            not depend on how many they are. It returns ``Pruned``, whose tensors (without ``out``), index, count and
            scores the next run of the plan overwrites.

        Raises:
            ValueError: a tensor differs from its example, or one more or one fewer is given.
        """
        cos, sin = (None, None) if rope is None else rope
        optional = (keep, key_mask, lse, row_weight, cos, sin, cu_seqlens, cu_seqlens_q)
        outs = self._result.tensors if out is None else list(out)
        if (
            [x is not None for x in optional] != self._optional
            or len(tensors) != self._n_tensors
            or len(outs) != self._n_tensors
        ):
            self._explain(optional, tensors, outs)
        some = [x for x in optional if x is not None]
        inputs = [query, key, rows, columns, *some, *tensors]
        pointers = _pointers(inputs, self._expected)
        pointers += self._own if out is None else _pointers(outs, self._expected_out)
        launch = self._program.bind([*inputs, *outs], pointers)
        result = self._result if out is None else self._result._replace(tensors=outs)

        def run() -> Pruned:
            launch()
            return result

        return run

    def reset(self) -> None:
        """Make the workspace ready again after a run that was broken off: an ordinary run does so itself."""
        self._program.reset()

    def _explain(
        self, optional: Sequence[Tensor | None], tensors: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> None:
        """Raise the ValueError that says which tensor is missing or too many."""
        for name, x, planned in zip(OPTIONAL, optional, self._optional, strict=True):
            expected = "a tensor as in the plan" if planned else "None as in the plan"
            check((x is not None) == planned, name, expected, "None" if x is None else "a tensor")
        for name, given in (("tensors", tensors), ("out", outs)):
            check(
                len(given) == self._n_tensors, name, f"{self._n_tensors} tensors as in the plan", len(given)
            )


def _pointers(tensors: Sequence[Tensor], expected: Sequence[_Expected]) -> list[int]:
    """Data pointers of tensors that are what the kernels were compiled for; this loop is most of the host time of ``run``."""
    pointers = []
    for x, like in zip(tensors, expected, strict=True):
        _, shape, stride, dtype, device, zero_bits = like
        pointer = x.data_ptr()
        same = x.shape == shape and x.stride() == stride and x.dtype is dtype and x.device == device
        if not same or pointer & zero_bits:
            like.refuse(x)
        pointers.append(pointer)
    return pointers


def _flat(
    query: Tensor, key: Tensor, tensors: Sequence[Tensor], settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Every tensor by name, in the order a run brings them."""
    cos, sin = settings.get("rope") or (None, None)
    named = settings | {"cos": cos, "sin": sin}
    flat = {"query": query, "key": key, "rows": named["rows"], "columns": named["columns"]}
    flat |= {name: named[name] for name in OPTIONAL if isinstance(named.get(name), Tensor)}
    return flat | {f"tensors[{i}]": x for i, x in enumerate(tensors)}


def _apart(examples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Examples with pointers of their own, by which the recorded launches tell them apart: one may be given twice."""
    seen: set[int] = set()
    apart = {}
    for name, x in examples.items():
        twice = x.data_ptr() in seen and x.numel() > 0
        apart[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if twice else x
        seen.add(x.data_ptr())
    return apart


def _nested(flat: dict[str, Tensor], n_tensors: int, settings: dict[str, Any]) -> tuple[Any, ...]:
    """Undo ``_flat``: the positional arguments; the keywords in ``settings`` take the tensors of ``flat``."""
    settings |= {name: x for name, x in flat.items() if name in settings}
    if "cos" in flat:
        settings["rope"] = flat["cos"], flat["sin"]
    return flat["query"], flat["key"], [flat[f"tensors[{i}]"] for i in range(n_tensors)]


def _load_triton() -> Callable[..., Any]:
    from vlmprune.triton_kernels.prune_tokens import prune_plan

    return prune_plan


register("prune_plan", (Backend("triton", _load_triton, needs_triton),))
