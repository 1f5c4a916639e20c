"""Counts the work of PyTorch code instead of timing it: numbers read and written, and multiplications."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmprune.ops import _operator

aten = torch.ops.aten
# They read as much as they write, however much there is to read.
PARTS = (aten.gather, aten.index, aten.index_select)
PRODUCTS = (aten.mm, aten.bmm)


class Work(TorchDispatchMode):
    """Inside, ``total`` grows by the largest input or output of every operation, and by a product's multiplications."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if function.namespace == "aten" and not function.is_view:
            seen = out if packet in PARTS else (args, kwargs, out)
            sizes = (x.numel() for x in tree_leaves(seen) if isinstance(x, torch.Tensor))
            self.total += max(sizes, default=0)
            if packet in PRODUCTS:
                self.total += out.numel() * args[0].shape[-1]
        return out


def work_of(call, monkeypatch):
    """The work of a call, that within our ops included (of whichever backend they choose)."""
    work, choose = Work(), _operator.choose

    def counted(name, x):
        run = choose(name, x)

        def within(*args):  # an op is one operation to the mode that is outside it
            with work:
                return run(*args)

        return within

    with monkeypatch.context() as patch, work:
        patch.setattr(_operator, "choose", counted)
        call()
    return work.total
