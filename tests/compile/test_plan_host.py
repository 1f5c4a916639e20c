"""Runs of plans, with a stub in the place of the GPU driver: two or three launches, and of PyTorch's operations only empty_like.

No other operation means nothing copied, filled or waited for. Run in a process of its own: TRITON_INTERPRET=0 python -m
pytest tests/compile.
"""

import host_launch_cost as host
import pytest
import torch
import triton
from micro.stub import Launcher
from torch.utils._python_dispatch import TorchDispatchMode

from vlmprune import ops

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter does not compile; run with TRITON_INTERPRET=0", allow_module_level=True)


class Operations(TorchDispatchMode):
    """Notes every operation that reaches PyTorch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """Arguments of every launch."""
    calls = []
    monkeypatch.setattr(Launcher, "__call__", lambda self, *args: calls.append(args))
    return calls


def assert_only_launches(plan, call, names, launched):
    with Operations() as operations:
        out = plan.run(**call)
    assert {op.name() for op in operations.seen} == {"aten::empty_like"}
    assert len(operations.seen) == len(out.tensors) + sum(x is not call.get("scores") for x in out[1:6])
    bound = plan.bind(**call)
    assert len(launched) == len(names)  # binding starts nothing
    with Operations() as operations:
        assert bound() is bound()
    assert operations.seen == [] and len(launched) == 3 * len(names)
    for args in launched:
        assert args[3] == 0  # on the current stream, which the stub calls 0
        plain = (int, float, bool, str, tuple, type(None), triton.language.dtype)
        assert all(type(arg) in plain for arg in args[9:])
    assert [replay._kernel.__name__ for replay in plan._program._replays] == names
    every = repr([args[9:] for args in launched[: len(names)]])
    assert all(str(x.data_ptr()) in every for x in (*out.tensors, *out[1:6]))


@pytest.mark.parametrize("with_lse, names", [(True, []), (False, ["_row_lse_kernel"])])
def test_a_run_only_launches(with_lse, names, launched):
    with host.stubbed():
        call = host.example(n_caches=2, with_lse=with_lse)
        plan = host.planned(call)
        assert not launched
        assert_only_launches(plan, call, [*names, "_score_select_kernel", "_gather_tokens_kernel"], launched)


def test_a_run_by_scores_only_launches(launched):
    with host.stubbed():
        call = dict(scores=torch.zeros(1, 576), tensors=[torch.zeros(1, 576, 1024)])
        plan = ops.ScoredPlan(**call, keep=128)
        assert_only_launches(plan, call, ["_select_columns_kernel", "_gather_tokens_kernel"], launched)
