"""A PrunePlan's run, with a stub in the place of the GPU driver: two or three launches, and not one PyTorch operation.

No operation means nothing allocated, copied or waited for. Run in a process of its own: TRITON_INTERPRET=0 python -m
pytest tests/compile.
"""

import host_launch_cost as host
import pytest
import triton
from micro.stub import Launcher
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("with_lse, names", [(True, []), (False, ["_row_lse_kernel"])])
def test_a_run_only_launches(with_lse, names, monkeypatch):
    launched = []
    monkeypatch.setattr(Launcher, "__call__", lambda self, *args: launched.append(args))
    with host.stubbed():
        call = host.example(n_caches=2, with_lse=with_lse)
        plan = host.planned(call)
        assert not launched
        with Operations() as operations:
            out = plan.run(**call)
        by_run = list(launched)
        bound = plan.bind(**call)
        assert launched == by_run  # binding starts nothing
        with operations:
            assert bound() is out
    assert operations.seen == []
    assert launched[len(by_run) :] == by_run
    launched = by_run
    assert [args[3] for args in launched] == [0] * (
        2 + len(names)
    )  # on the current stream, which the stub calls 0
    assert all(
        type(arg) in (int, float, bool, str, tuple, type(None), triton.language.dtype)
        for arg in launched[-1][9:]
    )
    assert [x.data_ptr() for x in out.tensors] == plan._own
    kernels = [replay._kernel.__name__ for replay in plan._program._replays]
    assert kernels == [*names, "_score_select_kernel", "_gather_tokens_kernel"]
