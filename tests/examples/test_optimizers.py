"""Muon in float32 throughout does what it does in bfloat16, to bfloat16's precision, and leaves gradients alone."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from training.loop import Plan, Trainer
from training.model import make_model, make_processor
from training.optimizers import Single


def stepped(single):
    """A matrix after three steps, and the last gradient: as given, and after the step."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(24, 40))
    muon = torch.optim.Muon([weight], lr=0.1)
    for _ in range(3):
        given = torch.randn(24, 40)
        weight.grad = given.clone()
        if single:
            with Single():
                muon.step()
        else:
            muon.step()
    return weight.detach(), given, weight.grad


def test_single_precision_agrees_with_bfloat16():
    (exact, given, after), (rounded, _, _) = stepped(True), stepped(False)
    assert torch.equal(after, given)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, atol=0.02, rtol=0)


def test_outside_of_it_bfloat16_is_bfloat16():
    with Single():
        assert torch.ones(2).bfloat16().dtype == torch.float32
    assert torch.ones(2).bfloat16().dtype == torch.bfloat16


class Precisions(TorchFunctionMode):
    """Notes the dtypes of all products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.addmm, torch.Tensor.__matmul__, torch.Tensor.matmul):
            self.dtypes.add(out.dtype)
        return out


@pytest.mark.parametrize("mixed, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_trainer_without_mixed_precision_never_multiplies_in_bfloat16(mixed, dtype):
    model = make_model(112, "sdpa", layers=(1, 1))
    trainer = Trainer(model, make_processor(112), Plan(batch=1, steps=1), torch.device("cpu"), mixed)
    with Precisions() as seen:
        [*trainer.run()]
    assert dtype in seen.dtypes
    assert (torch.bfloat16 in seen.dtypes) == mixed
