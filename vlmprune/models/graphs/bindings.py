"""What a captured run has taken from a module for good: where its weights lie, and which hooks run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Bindings:
    """Weights and buffers by address, hooks by number. ``hold`` tells whether all is as it was at the capture.

    Weights that change in place are read at every replay. Those that moved (``.to``, ``load_state_dict(assign=True)``,
    adapters) are not, and no hook runs in a replay.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tensors: list[tuple[dict[str, Any], str, int]] = []
        self.modules = list(module.modules())
        for part in self.modules:
            for table in (part._parameters, part._buffers):
                self.tensors += [(table, name, x.data_ptr()) for name, x in table.items() if x is not None]
        self.hooks, self.children = self._hooks(), self._children()

    def hold(self) -> bool:
        """Whether a replay does what a call would."""
        if self.hooks != self._hooks() or self.children != self._children():
            return False
        return all(
            isinstance(now := table.get(name), Tensor) and now.data_ptr() == at
            for table, name, at in self.tensors
        )

    def _hooks(self) -> int:
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in self.modules)

    def _children(self) -> list[int]:
        """Modules that stand below others, by identity: an adapter takes the place of one."""
        return [id(child) for part in self.modules for child in part._modules.values()]
