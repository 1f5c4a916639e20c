"""The recorder in the place of CUDA: what it notes is what was asked for, and nothing of it stays behind."""

import host_launch_cost as host
import pytest
import torch
import triton
from micro.stub import Launcher
from triton.runtime import driver

import vlmprune
from helpers.recording_driver import STREAM, recording_driver
from helpers.tiny import make_batch, make_model
from vlmprune import ops
from vlmprune.ops import _dispatch
from vlmprune.triton_kernels._rows import coded

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter has no launcher; run with TRITON_INTERPRET=0", allow_module_level=True)


def test_a_launch_is_noted_with_its_parameters():
    hidden, index = torch.randn(2, 40, 64), torch.tensor([[0, 3, 39], [1, 2, 7]])
    with recording_driver(ops=True) as recorder:
        (out,) = ops.gather_tokens([hidden], index)
        (launch,) = recorder.take()
        assert recorder.take() == []
    assert (launch.name, launch.stream) == ("_gather_tokens_kernel", STREAM)
    assert launch.grid[2] == 2 and launch.block % 32 == 0
    assert sorted(launch.pointers.values()) == sorted(x.data_ptr() for x in (hidden, index, out))
    scalars = (launch.scalars[name] for name in ("K", "lengths.0", "strides.0.0"))
    assert tuple(scalars) == (3, *coded([40]), 40 * 64)
    torch.testing.assert_close(out, hidden[torch.arange(2)[:, None], index], rtol=0, atol=0)


def test_a_float_is_noted_as_the_number_it_is():
    query = torch.randn(1, 2, 3, 16)
    with recording_driver(ops=True) as recorder:
        ops.row_lse(query, query, torch.tensor([[2]]), scale=0.15625)
        (launch,) = recorder.take()
    assert launch.scalars["scale"] == 0.15625


def test_nothing_stays_behind():
    before, tables = driver._active, {**_dispatch.TABLES}
    scores = torch.rand(1, 50)
    with recording_driver(ops=True):
        ops.select_topk(scores, 3)
        with pytest.raises(ZeroDivisionError), recording_driver():
            raise ZeroDivisionError
        ops.select_topk(scores, 3)
    assert driver._active is before and tables == _dispatch.TABLES
    with pytest.raises(vlmprune.BackendError), ops.use_backend("triton"):
        ops.select_topk(scores, 3)


def test_kernels_of_another_driver_are_not_taken_for_its_own(monkeypatch):
    from vlmprune.triton_kernels.select_topk import select_topk

    launched = []
    monkeypatch.setattr(Launcher, "__call__", lambda self, *args: launched.append(args))
    scores = torch.rand(1, 50)
    for n in (1, 2):
        with host.stubbed():
            select_topk(scores, 3, None, 3)
        assert len(launched) == n
        with recording_driver() as recorder:
            select_topk(scores, 3, None, 3)
            assert len(recorder.take()) == 1
        assert len(launched) == n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefill_goes_on_with_what_the_reference_gives(dtype):
    """Every op launches its kernels, and the logits are those of the reference."""
    model, batch = make_model().to(dtype), make_batch([[4, "I", 7], [2, "I", 3, "I", 5]])
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with torch.no_grad(), vlmprune.prune(model, vlmprune.FastV(layer=2, keep=0.4)):
        expected = model(**batch).logits
        with recording_driver(ops=True) as recorder:
            logits = model(**batch).logits
            launches = recorder.take()
    assert torch.equal(logits, expected)
    assert "_gather_tokens_kernel" in [launch.name for launch in launches]
    assert {launch.stream for launch in launches} == {STREAM}


def test_runs_of_a_plan_return_what_the_reference_gives():
    key, hidden = torch.eye(6, 8)[None, None], torch.arange(12.0).view(1, 6, 2)
    lists = {"rows": torch.tensor([[5]]), "columns": torch.tensor([[1, 2, 3, 4]])}
    with recording_driver(ops=True):
        plan = ops.PrunePlan(key[:, :, 3:4], key, [hidden], **lists, keep=1)
        for wanted in (3, 4):
            query = key[:, :, wanted : wanted + 1]
            out = plan.run(query, key, [hidden], **lists)
            assert out.index.tolist() == [[0, wanted, 5]] and out.kept.tolist() == [[wanted - 1]]
            assert torch.equal(out.tensors[0], hidden[:, [0, wanted, 5]])
