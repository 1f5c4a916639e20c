"""Whether the host reads what the device has computed: then Python decides by it, and a graph would repeat the decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"}
COPIES = {"_to_copy", "copy_"}
METHODS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy", torch.Tensor.cpu: "cpu"}
"""What reaches no dispatcher where the device is the CPU."""


class HostRead(RuntimeError):
    """Something that must not wait for the device did."""


def refuse(how: str) -> None:
    """Raise HostRead."""
    raise HostRead(how)


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which ``told`` hears of every wait for a device: .item(), bool(), .tolist(), boolean indexing, copies.

    Of tensors made of Python's numbers, too: a graph would copy them from where the host had them once.

    Args:
        device: the one.
        told: gets what did it; as it is, raises HostRead.
    """

    def __init__(self, device: torch.device, told: Callable[[str], None] = refuse) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.told, self.methods = device, told, _Methods(device, told)

    def __enter__(self) -> Any:
        self.methods.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.methods.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, here = func.overloadpacket.__name__, _is_on(self.device, args)
        if name in READS and here:
            self.told(name)
        if name == "index" and here:
            given = [at for at in args[1] if at is not None]
            if any(at.dtype == torch.bool for at in given):
                self.told("boolean indexing")
            if any(at.device.type != self.device.type for at in given):
                self.told("an index of the host's")
        out = func(*args, **(kwargs or {}))
        if name == "lift_fresh" and args[0].numel():
            self.told("a tensor of the host's numbers")
        if name in COPIES:
            places = {x.device.type for x in (*args[:2], out) if isinstance(x, Tensor)}
            if places > {self.device.type}:
                self.told("a copy from or to the host")
        return out


class _Methods(TorchFunctionMode):
    """The same for methods."""

    def __init__(self, device: torch.device, told: Callable[[str], None]) -> None:
        super().__init__()
        self.device, self.told = device, told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS and _is_on(self.device, args):
            self.told(METHODS[func])
        return func(*args, **(kwargs or {}))


def _is_on(device: torch.device, args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.device.type == device.type for x in args)
