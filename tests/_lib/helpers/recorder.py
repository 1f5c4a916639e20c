"""What stands in the place of CUDA graphs where there is no GPU: it notes the operations of a run, and repeats them alone.

Nothing of the Python between them runs again, as in a graph; what a graph reads and writes lies where it lay. On a GPU the
same tests have CUDA graphs.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmprune.models.graphs.reads import HostReads
from vlmprune.models.graphs.recorder import CudaGraphs, Recording


class Operations(TorchDispatchMode):
    """Records operations with the tensors they read and wrote; ``replay`` repeats them in the same memory."""

    def __init__(self):
        super().__init__()
        self.nodes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.nodes.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()  # a graph writes whatever tensor it has made, also in that mode
    def replay(self):
        for func, args, kwargs, out in self.nodes:
            fresh = func(*args, **kwargs)
            if any(x.alias_info for x in func._schema.returns):
                continue  # a view, or written in place
            for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                if isinstance(old, torch.Tensor):
                    assert old.shape == new.shape
                    old.copy_(new)

    @property
    def nbytes(self):
        """Of all memory that it holds, which a graph's pool would use again."""
        made = {}
        for func, _, _, out in self.nodes:
            if not any(x.alias_info for x in func._schema.returns):
                made |= {x.data_ptr(): x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return sum(made.values())


class Recorder:
    """As ``vlmprune.models.graphs.recorder.Recorder`` has it, on any device; counts.

    Args:
        fails: an error to raise at the next captures, one each.
    """

    def __init__(self, *fails):
        self.fails, self.captures, self.replays = list(fails), 0, 0

    def refusal(self, device):
        return None

    def record(self, run, device):
        if self.fails:
            raise self.fails.pop(0)
        out, recording = self._recorded(run, device)
        self.captures += 1

        def replay():
            self.replays += 1
            recording.replay()

        return out, Recording(replay, recording.nbytes)

    def _recorded(self, run, device):
        if device.type == "cuda":
            return CudaGraphs().record(run, device)
        run()
        with HostReads(device):
            run()
        with Operations() as operations:
            out = run()
        return out, Recording(operations.replay, operations.nbytes)
