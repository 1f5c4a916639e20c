"""PrunePlan: prune_tokens for one set of shapes, with every decision and allocation made before the first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops._dispatch import choose, register
from vlmprune.ops.prune_tokens import Pruned, checked
from vlmprune.ops.scoring import Scoring, ScoringKeywords

ALIGNMENT = 16  # bytes; a kernel is compiled for pointers that are multiples of it, or for any


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
        query, key, tensors, keep, width, scoring: examples, as for ``prune_tokens``; the plan keeps shapes, strides, dtypes,
            device and numbers, and no data of theirs. The kernels must be able to read them in place: lists, masks and
            weights are contiguous, cos and sin have equal strides.

    Raises:
        InputError: as ``prune_tokens``, or an example would have to be copied at every run.
        BackendError: Triton cannot run on the device of ``query``.

    Example:
        Not run by the tests, as there are no kernels without a GPU. ``step`` is called once a prompt:

        >>> lists = dict(rows=rows, columns=columns)  # doctest: +SKIP
        >>> plan = ops.PrunePlan(query, key, [hidden], keep=128, **lists)  # doctest: +SKIP
        >>> step = plan.bind(query, key, [hidden], **lists)  # doctest: +SKIP
        >>> step().index.shape  # doctest: +SKIP
        torch.Size([1, 192])
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        tensors: Sequence[Tensor],
        *,
        keep: int | Tensor,
        width: int | None = None,
        **scoring: Unpack[ScoringKeywords],
    ) -> None:
        s, tensors, keep, width = checked(query, key, tensors, keep=keep, width=width, **scoring)
        check(s.rows.shape[0] > 0, "rows", "at least one sample", tuple(s.rows.shape))
        fields = {**s._asdict(), "keep": keep}
        self._named = dict.fromkeys(name for name, x in fields.items() if isinstance(x, Tensor))
        examples = {name: fields[name] for name in self._named}
        examples |= {f"tensors[{i}]": x for i, x in enumerate(tensors)}
        apart = _apart(examples)
        inputs = list(apart.values())
        fields = {name: apart.pop(name, x) for name, x in fields.items()}
        keep = fields.pop("keep")
        build = choose("prune_plan", query)
        self._program, result = build(Scoring(**fields), list(apart.values()), keep, width, inputs)
        self._result = Pruned(*result)
        for i, (name, x) in enumerate(examples.items()):
            read = i in self._program.used or self._result.index.numel() == 0 or x.numel() == 0
            check(read, name, "a tensor that the kernels can read in place", f"strides {x.stride()}")
        self._expected = [_Expected.of(name, x) for name, x in examples.items()]
        self._expected_out = [_Expected.of(f"out[{i}]", x) for i, x in enumerate(self._result.tensors)]
        self._own = [x.data_ptr() for x in self._result.tensors]

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
        keep: Tensor | None = None,
        out: Sequence[Tensor] | None = None,
        **scoring: Unpack[ScoringKeywords],
    ) -> Callable[[], Pruned]:
        """Check these tensors, which are like the examples, once for many runs; ``keep`` only if it was a tensor.

        ``scoring`` takes the keywords of the plan that are tensors.

        Args:
            out: where the gathered tensors go, contiguous, shaped like those the plan returns; None = the plan's own.

        Returns:
            A function that prunes what the tensors hold when it is called; it keeps them alive, and its host time does
            not depend on how many they are. It returns ``Pruned``, whose tensors (without ``out``), index, count and
            scores the next run of the plan overwrites.

        Raises:
            InputError: a tensor differs from its example, or one more or one fewer is given.
        """
        cos, sin = scoring.get("rope") or (None, None)
        every = {**scoring, "query": query, "key": key, "keep": keep, "rope": None, "cos": cos, "sin": sin}
        given = {name: x for name, x in every.items() if x is not None}
        outs = self._result.tensors if out is None else list(out)
        n = len(self._own)
        if given.keys() != self._named.keys() or len(tensors) != n or len(outs) != n:
            self._explain(given, tensors, outs)
        inputs: list[Any] = [*[given[name] for name in self._named], *tensors]
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

    def _explain(self, given: dict[str, object], tensors: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Raise the InputError that says which argument is missing or too many."""
        for name in [*self._named, *given]:
            expected = "a tensor as in the plan" if name in self._named else "None as in the plan"
            got = given.get(name)
            same = (name in self._named) == (name in given)
            check(same, name, expected, "a tensor" if isinstance(got, Tensor) else repr(got))
        for name, x in (("tensors", tensors), ("out", outs)):
            n = len(self._own)
            check(len(x) == n, name, f"{n} tensors as in the plan", len(x))


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


def _apart(examples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Examples with pointers of their own, by which the recorded launches tell them apart: one may be given twice."""
    seen: set[int] = set()
    apart = {}
    for name, x in examples.items():
        twice = x.data_ptr() in seen and x.numel() > 0
        apart[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if twice else x
        seen.add(x.data_ptr())
    return apart


register("prune_plan", None, kernels="prune_tokens")
