"""Recorded launches of an op and what their tensors must be like: what the plans of ``plan.py`` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops._dispatch import choose, register
from vlmprune.ops.prune_tokens import Pruned

Bound = tuple[Callable[[], None], Pruned]
"""What launches, and what it fills."""

ALIGNMENT = 16  # bytes; a kernel is compiled for pointers that are multiples of it, or for any


class _Expected(NamedTuple):
    """What a tensor of a run must have in common with the example the plan was built from."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    contiguous: bool  # then so is what it stands for, which is sooner asked than strides are compared
    dtype: torch.dtype
    device: torch.device
    zero_bits: int  # of the pointer

    @classmethod
    def of(cls, name: str, x: Tensor) -> _Expected:
        """Describe an example."""
        zero_bits = ALIGNMENT - 1 if x.data_ptr() % ALIGNMENT == 0 else 0
        return cls(name, x.shape, x.stride(), x.is_contiguous(), x.dtype, x.device, zero_bits)

    def refuse(self, x: Tensor) -> None:
        """Raise the ValueError that says what differs."""
        check(x.shape == self.shape, self.name, f"{list(self.shape)} as in the plan", tuple(x.shape))
        check(x.dtype == self.dtype, self.name, f"{self.dtype} as in the plan", x.dtype)
        check(x.device == self.device, self.name, f"the device {self.device} as in the plan", x.device)
        check(x.stride() == self.stride, self.name, f"strides {self.stride} as in the plan", x.stride())
        where = f"memory that starts at a multiple of {ALIGNMENT} bytes as in the plan"
        check(False, self.name, where, hex(x.data_ptr()))


class RecordedPlan(ABC):
    """Recorded launches, repeated on other tensors.

    Args:
        op: whose launches.
        fields: its arguments by name, but for the tensors to gather.
        tensors: those.
        arguments: puts them together again, of ``(tensors, fields)``.
        own: fields that are no input, though they are tensors.
    """

    OUTPUTS: ClassVar[tuple[str, ...]]
    """Fields of ``Pruned`` in the order in which the launcher returns them, behind the gathered tensors."""

    def __init__(
        self,
        op: str,
        fields: dict[str, Any],
        tensors: Sequence[Tensor],
        arguments: Callable[[list[Tensor], dict[str, Any]], tuple[Any, ...]],
        own: Sequence[str] = (),
    ) -> None:
        inputs = {name: x for name, x in fields.items() if isinstance(x, Tensor) and name not in own}
        examples = inputs | {f"tensors[{i}]": x for i, x in enumerate(tensors)}
        apart = _apart(examples)
        exchanged = list(apart.values())
        fields = {name: apart.pop(name, x) for name, x in fields.items()}
        build = choose("prune_plan", exchanged[0])
        self._program, outputs = build(op, arguments(list(apart.values()), fields), exchanged)
        self._names = dict.fromkeys("keep" if name == "quota" else name for name in inputs)
        self._n = len(tensors)
        reads_none = outputs[self._n].numel() == 0  # an index of nothing
        for i, (name, x) in enumerate(examples.items()):
            read = i in self._program.used or reads_none or x.numel() == 0
            check(read, name, "a tensor that the kernels can read in place", f"strides {x.stride()}")
        self._expected = [_Expected.of(name, x) for name, x in examples.items()]
        self._expected_out = [_Expected.of(f"out[{i}]", x) for i, x in enumerate(outputs[: self._n])]
        # like the outputs but for their memory, which nobody keeps
        self._like = [x.new_empty(()).expand(x.shape) for x in outputs]
        unread = {"scores"} if "code" in self._names else {"scores", "count"}
        names = [*[""] * self._n, *self.OUTPUTS]
        self._own = [x if name in unread else None for name, x in zip(names, outputs, strict=False)]
        self._new = [(at, like) for at, like in enumerate(self._like) if self._own[at] is None]

    @abstractmethod
    def _pruned(self, gathered: list[Tensor], others: list[Tensor], inputs: list[Tensor]) -> Pruned:
        """The outputs of a run on these inputs."""

    @property
    def nbytes(self) -> int:
        """Bytes of the workspace."""
        return int(self._program.nbytes) + sum(x.nbytes for x in self._own if x is not None)

    def reset(self) -> None:
        """Make the workspace ready again after a run that was broken off: an ordinary run does so itself."""
        self._program.reset()

    def _bind(
        self, every: Mapping[str, Any], tensors: Sequence[Tensor], out: Sequence[Tensor] | None
    ) -> Bound:
        """Launches and outputs of these inputs, once they are checked."""
        given = every.keys() == self._names.keys() and len(tensors) == self._n
        inputs = [*[every[name] for name in self._names], *tensors] if given else []
        pointers = _pointers(inputs, self._expected)
        if pointers is None or (out is not None and len(out) != self._n):
            self._explain(every, tensors, out)
        if out is not None and _pointers(out, self._expected_out) is None:
            _refuse(out, self._expected_out)
        assert pointers is not None
        new = [torch.empty_like(x) for x in (self._like if out is None else self._like[self._n :])]
        outputs = [*(out or ()), *new]
        pointers += [x.data_ptr() for x in outputs]
        launch = self._program.bind([*inputs, *outputs], pointers)
        return launch, self._pruned(outputs[: self._n], outputs[self._n :], inputs)

    def attempt(self, inputs: list[Tensor]) -> Pruned | None:
        """``run`` at the least host time, for who has the numbers of the plan: None where an input is not like its example.

        The inputs are the tensors of ``Scoring`` (or ``Scored``) and of ``Selection`` in their order, then those to gather.
        Scores, and ``count`` where no codes make it vary, are memory of the plan, which its next run fills again.
        """
        pointers = _pointers(inputs, self._expected)
        if pointers is None:
            return None
        outputs: list[Any] = self._own.copy()
        for at, like in self._new:
            outputs[at] = torch.empty_like(like)
        pointers += [x.data_ptr() for x in outputs]
        self._program.run([*inputs, *outputs], pointers)
        return self._pruned(outputs[: self._n], outputs[self._n :], inputs)

    def _explain(
        self, every: Mapping[str, Any], tensors: Sequence[Tensor], out: Sequence[Tensor] | None
    ) -> None:
        """Raise the InputError that says which argument is missing, too many, or not as in the plan."""
        for name in [*self._names, *every]:
            expected = "a tensor as in the plan" if name in self._names else "None as in the plan"
            got = every.get(name)
            same = (name in self._names) == (name in every)
            check(same, name, expected, "a tensor" if isinstance(got, Tensor) else repr(got))
        for arg, x in (("tensors", tensors), ("out", out)):
            check(x is None or len(x) == self._n, arg, f"{self._n} tensors as in the plan", len(x or ()))
        _refuse([*[every[name] for name in self._names], *tensors], self._expected)


def _refuse(tensors: Sequence[Tensor], expected: Sequence[_Expected]) -> None:
    """Raise the InputError of the first tensor that is not like its example."""
    for x, like in zip(tensors, expected, strict=True):
        if _pointers([x], [like]) is None:
            like.refuse(x)


def _pointers(tensors: Sequence[Tensor], expected: Sequence[_Expected]) -> list[int] | None:
    """Data pointers of tensors that are all what the kernels were compiled for; this loop is most of the host time of ``run``."""
    if len(tensors) != len(expected):
        return None
    pointers = []
    for x, (_, shape, stride, contiguous, dtype, device, zero_bits) in zip(tensors, expected, strict=True):
        pointer = x.data_ptr()
        if (
            x.shape != shape
            or pointer & zero_bits
            or not (x.is_contiguous() if contiguous else x.stride() == stride)
            or x.dtype is not dtype
            or x.device != device
        ):
            return None
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
