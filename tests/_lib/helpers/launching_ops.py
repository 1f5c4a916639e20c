"""vlmprune's ops as on a GPU, but for tensors on the CPU and a driver that runs nothing: every op launches its kernels.

Then the reference computes what they would have, and it is written where they would have written it. So a model goes on
with right numbers, and the tensor that one op hands to the next lies where both of their launches say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vlmprune.ops import _dispatch

Function = Callable[..., Any]


@contextmanager
def launching_ops() -> Iterator[None]:
    """Inside, ops and plans launch, and their outputs are filled; ``use_backend("reference")`` is as always."""
    tables = {**_dispatch.TABLES}
    _dispatch.TABLES.update({op: _launching(op, table) for op, table in tables.items()})
    try:
        yield
    finally:
        _dispatch.TABLES.update(tables)


def _launching(op: str, table: Sequence[_dispatch.Backend]) -> tuple[_dispatch.Backend, ...]:
    """An op's backends: its launcher anywhere, and its reference if it has one."""
    backends = {backend.name: backend for backend in table}

    def load() -> Function:
        launcher = backends["triton"].load()
        return _planned(launcher) if op == "prune_plan" else _filled(launcher, _reference(table))

    reference = [backends["reference"]] if "reference" in backends else []
    return _dispatch.Backend("triton", load, _dispatch.always), *reference


def _reference(table: Sequence[_dispatch.Backend]) -> Function:
    return next(backend.load() for backend in table if backend.name == "reference")


def _filled(launcher: Function, reference: Function) -> Function:
    """The launcher, and the reference into what it returns."""

    def run(*args: Any) -> Any:
        out = launcher(*args)
        _write(out, reference(*args))
        return out

    return run


def _write(out: Any, values: Any) -> None:
    """Fill the tensors of ``out`` in place."""
    for x, value in zip(_tensors(out), _tensors(values), strict=True):
        assert x.shape == value.shape, f"the launcher made {x.shape}, the reference {value.shape}"
        x.copy_(value)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for x in values:
            yield from _tensors(x)


def _planned(build: Function) -> Function:
    """The builder of plans, whose programs fill their outputs after every run."""

    def run(op: str, arguments: tuple[Any, ...], inputs: Sequence[Tensor]) -> tuple[_Program, list[Tensor]]:
        program, outputs = build(op, arguments, inputs)
        return _Program(program, _reference(_dispatch.TABLES[op]), arguments, inputs), outputs

    return run


class _Program:
    """A plan's program and the reference of the op it repeats."""

    def __init__(
        self, program: Any, reference: Function, arguments: tuple[Any, ...], inputs: Sequence[Tensor]
    ) -> None:
        self._program, self._reference, self._arguments, self._inputs = program, reference, arguments, inputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def bind(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> Callable[[], None]:
        """As the program, with ``tensors`` in the places of the example's."""
        launch, n = self._program.bind(tensors, pointers), len(self._inputs)
        places = {id(example): x for example, x in zip(self._inputs, tensors[:n], strict=True)}

        def run() -> None:
            launch()
            _write(list(tensors[n:]), self._reference(*_exchanged(self._arguments, places)))

        return run

    def run(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> None:
        """As the program."""
        self.bind(tensors, pointers)()


def _exchanged(values: Any, places: dict[int, Tensor]) -> Any:
    """``values`` with other tensors in the places of some of theirs."""
    if isinstance(values, tuple | list):
        inner = [_exchanged(x, places) for x in values]
        return type(values)(*inner) if hasattr(values, "_fields") else type(values)(inner)
    return places.get(id(values), values)
