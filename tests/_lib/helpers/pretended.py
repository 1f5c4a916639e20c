"""A device that is not there: its tensors lie on the CPU, are marked, say that they are elsewhere, and mix with no others.

What belongs on the device is known by its storage. An operation that meets a marked tensor and one that is not raises, as
CUDA would, and so does ``numpy()``. As on a GPU, numbers on the CPU (0-dim tensors) may join, and indices, and copies go
between. Only kernels cannot be tried so: ops take their reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import _functorch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE, CPU = torch.device("privateuseone", 0), torch.device("cpu")
COPIES = {"aten::copy_", "aten::_to_copy"}
UNSEEN = {torch.linalg.matrix_rank}
"""What makes further tensors where its operands seem to be, in C++."""
INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def storage(x: Tensor) -> Any:
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x.untyped_storage()


def is_there(x: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return getattr(storage(x), "there", False)


def mark(made: Any, there: bool) -> Any:
    """Note where every tensor of ``made`` is."""
    with torch._C.DisableTorchFunction():
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                storage(x).there = there
    return made


def rebuilt(make: Any, args: Any) -> Any:
    """What comes out of the pickle of a tensor that was on the device: as from CUDA, it is there again."""
    return mark(make(*args), True)


def reduced(x: Tensor, protocol: int, real: Any = Tensor._reduce_ex_internal) -> Any:
    with torch._C.DisableTorchFunction():
        return (rebuilt, real(x, protocol)) if is_there(x) else real(x, protocol)


class Saying(TorchFunctionMode):
    """What Python asks of a tensor's device, and makes for one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        there = bool(args) and isinstance(args[0], Tensor) and is_there(args[0])
        if func == Tensor.device.__get__:
            return DEVICE if there else func(*args)
        if func == Tensor.is_cpu.__get__:
            return not there and func(*args)
        if func in (Tensor.numpy, Tensor.__array__) and there:
            raise TypeError(f"can't convert {DEVICE} tensor to numpy")
        if func is Tensor.cpu:
            func, kwargs["device"] = Tensor.to, CPU
        if func is Tensor.to:
            return self._moved(there, *args, **kwargs)
        if func is Tensor.__deepcopy__:
            return mark(func(*args), there)
        if func in UNSEEN:
            with _disable_current_modes():
                return mark(func(*args, **kwargs), there)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        asked = torch.device(kwargs["device"])
        if asked.type == DEVICE.type:
            return mark(func(*args, **kwargs | {"device": CPU}), True)
        return mark(func(*args, **kwargs), False)

    def _moved(self, there: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x.to(...)``, whose device may be said as one, as a text or by another tensor."""
        other = args[0] if args else kwargs.get("device", kwargs.get("other"))
        if isinstance(other, Tensor):
            args, asked = (CPU, other.dtype, *args[1:]), DEVICE if is_there(other) else other.device
        elif isinstance(other, str | torch.device):
            asked = torch.device(other)
            args, kwargs = (CPU, *args[1:]), {name: v for name, v in kwargs.items() if name != "device"}
        else:
            return Tensor.to(x, *args, **kwargs)
        goes = asked.type == DEVICE.type
        if not goes and asked.type != "cpu":  # meta
            return mark(Tensor.to(x, asked, *args[1:], **kwargs), False)
        if goes == there:
            return Tensor.to(x, *args, **kwargs)
        return mark(Tensor.to(x, *args, **kwargs | {"copy": True}), goes)


class Checking(TorchDispatchMode):
    """Carries the mark from operands to results; raises where devices mix. Counts the operations on the device."""

    NOTE = "operations on the device"

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        places = {x: is_there(x) for x in operands(name, args, kwargs) if x.device.type != "meta"}
        there = any(places.values())
        stray = [x for x, place in places.items() if there and not place and x.ndim]
        if stray and name not in COPIES:
            shapes = ", ".join(f"{list(x.shape)}" for x in stray)
            raise RuntimeError(f"{name}: expected all tensors on {DEVICE}, got {shapes} on cpu")
        self.count += there
        if name in OPDEFS:  # ops of ours: what they do is looked at too
            with Saying(), self:
                out = OPDEFS[name]._init_fn(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        return mark(out, True) if there and name != "aten::copy_" else out


def operands(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors whose devices must agree: not the indices, which may be on the CPU."""
    if name in INDEXING:
        args = (args[0], *args[2:])
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]


@contextmanager
def pretending() -> Iterator[Checking]:
    """Inside, the device is there. Skips what leaves this thread's Python, where nothing can be marked."""

    def skip(*args: Any, **kwargs: Any) -> Any:
        pytest.skip("a pretended device is seen by one thread of Python, uncompiled")

    with pytest.MonkeyPatch.context() as patch, Saying(), Checking() as checking:
        patch.setattr(Tensor, "_reduce_ex_internal", reduced)
        patch.setattr(torch, "compile", skip)
        patch.setattr("threading.Thread.start", skip)
        yield checking


def shares(reports: list[Any]) -> str:
    """How many tests ran operations on the device, and where those are that ran none."""
    none = [r.nodeid.partition("::")[0] for r in reports if not dict(r.user_properties).get(Checking.NOTE)]
    files = ", ".join(f"{name} {n}" for name, n in Counter(none).most_common())
    ran = len(reports) - len(none)
    return f"{ran} of {len(reports)} tests ran operations on {DEVICE}; none: {files or 0}"
