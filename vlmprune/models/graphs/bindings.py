"""What a captured run has taken from a module for good: where its weights lie, which modules and how many hooks there are."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor, nn


class Bindings:
    """Weights and buffers by address, modules by identity, hooks by number.

    Weights that change in place are read at every replay. Those that moved (``.to``, ``load_state_dict(assign=True)``) or
    were wrapped (adapters) are not, and no hook runs in a replay.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._hooks = [table for part in modules for table in (part._forward_hooks, part._forward_pre_hooks)]
        self._children = [part._modules for part in modules if part._modules]
        self._tensors = [
            (table, name, x.data_ptr())
            for part in modules
            for table in (part._parameters, part._buffers)
            for name, x in table.items()
            if x is not None
        ]
        self._kept = modules  # so that no identity is given again
        self._numbers = self._count(), self._identities()

    def hold(self) -> bool:
        """Whether a replay does what a call would."""
        if self._numbers != (self._count(), self._identities()):
            return False
        return all(_lies_at(table.get(name), at) for table, name, at in self._tensors)

    def _count(self) -> int:
        return sum(map(len, self._hooks))

    def _identities(self) -> list[int]:
        return [*map(id, chain.from_iterable(table.values() for table in self._children))]


def _lies_at(x: Any, address: int) -> bool:
    return isinstance(x, Tensor) and x.data_ptr() == address
