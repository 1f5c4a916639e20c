"""What a captured run has taken from modules for good: where their weights lie, what they are made of, what they are set to."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any
from weakref import ref

from torch import Tensor, nn

KNOWN = {"torch", "transformers"}
"""Whose modules are set by their configuration alone. Others' (adapters) may be switched, scaled or merged between calls."""
BASE = {*vars(nn.Module())} - {"training"}


class Bindings:
    """Weights and buffers by identity and address; modules, their classes and forwards by identity; hooks by number.

    Weights that change in place are read at every replay. Those that moved (``.to``, ``load_state_dict(assign=True)``) or
    were wrapped (adapters) are not, and no hook runs in a replay.

    Args:
        text: the text model. Its own forward is not looked at, in the place of which graphs stand.
        also: other modules that the run calls.
    """

    def __init__(self, text: nn.Module, *also: nn.Module) -> None:
        parts = [part for module in (text, *also) for part in module.modules()]
        self._hooks = [table for part in parts for table in (part._forward_hooks, part._forward_pre_hooks)]
        self._children = [part._modules for part in parts if part._modules]
        self._parts, self._fields = parts, [vars(part) for part in parts[1:]]
        self._tensors = [
            (table, name, ref(x), x.data_ptr())
            for part in parts
            for table in _tables(part)
            for name, x in table.items()
            if x is not None
        ]
        self._others = [part for part in parts if type(part).__module__.partition(".")[0] not in KNOWN]
        self._numbers, self._objects = self._count(), self._made_of()
        self._settings = [*map(_settings, self._others)]

    def hold(self) -> bool:
        """Whether a replay does what a call would."""
        made_of = self._made_of()
        if self._numbers != self._count() or len(made_of) != len(self._objects):
            return False
        if not all(map(is_, made_of, self._objects)):
            return False
        if not all(_is_still(table.get(name), x, at) for table, name, x, at in self._tensors):
            return False
        return self._settings == [*map(_settings, self._others)]

    def _count(self) -> int:
        return sum(map(len, self._hooks))

    def _made_of(self) -> list[Any]:
        """Children, forwards that were put on a module, classes (which a wrapper may change)."""
        children = chain.from_iterable(table.values() for table in self._children)
        forwards = (fields.get("forward") for fields in self._fields)
        return [*children, *forwards, *map(type, self._parts)]


def _tables(part: nn.Module) -> tuple[dict[str, Tensor | None], ...]:
    parameters: Any = part._parameters
    return parameters, part._buffers


def _is_still(x: Tensor | None, before: ref[Tensor], address: int) -> bool:
    return x is not None and x is before() and x.data_ptr() == address


def _settings(part: nn.Module) -> dict[str, Any]:
    """What a module of other code is set to: an adapter's scale, whether it is on, whether it was merged."""
    return {name: _plain(x) for name, x in vars(part).items() if name not in BASE}


def _plain(x: Any) -> Any:
    """Numbers and words, in whatever container; None in the place of all else."""
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple | set):
        return [*map(_plain, x)]
    return x if isinstance(x, int | float | str) else None
