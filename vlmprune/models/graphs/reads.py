"""Whether the host reads what the device has computed: then Python decides by it, and a graph would repeat the decision."""

from __future__ import annotations

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


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which every wait for this device raises HostRead: .item(), bool(), .tolist(), boolean indexing, copies out."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.methods = device, _Methods(device)

    def __enter__(self) -> Any:
        self.methods.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.methods.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS and _is_on(self.device, args):
            raise HostRead(name)
        if name == "index" and _is_on(self.device, args):
            given = [at for at in args[1] if at is not None]
            if any(at.dtype == torch.bool for at in given):
                raise HostRead("boolean indexing")
            if any(at.device.type != self.device.type for at in given):
                raise HostRead("an index of the host's")
        out = func(*args, **(kwargs or {}))
        if name in COPIES and {x.device.type for x in (*args[:2], out) if isinstance(x, Tensor)} > {
            self.device.type
        }:
            raise HostRead("a copy from or to the host")
        return out


class _Methods(TorchFunctionMode):
    """The same for methods."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS and _is_on(self.device, args):
            raise HostRead(METHODS[func])
        return func(*args, **(kwargs or {}))


def _is_on(device: torch.device, args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.device.type == device.type for x in args)
