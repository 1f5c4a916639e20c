"""The tests' own ``--device``: a pretended one refuses what CUDA would, and allows what CUDA does."""

import copy
import pickle

import pytest
import torch

import vlmprune
from helpers import device, pretended
from helpers.tiny import make_batch, make_model


@pytest.fixture
def there():
    with pretended.pretending():
        yield pretended.DEVICE


ALLOWED = {
    "a number": lambda x: x + torch.tensor(2.0),
    "indices": lambda x: x[torch.tensor([0, 2])],
    "a copy in": lambda x: x.copy_(torch.zeros(3)),
    "an alias": lambda x: x.view(1, 3)[:, 1:],
    "one made alike": torch.zeros_like,
    "one made there": lambda x: torch.arange(3, device=x.device),
    "one moved alike": lambda x: torch.zeros(3).to(x),
    "a deep copy": copy.deepcopy,
    "a pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "an op of ours": lambda x: vlmprune.ops.select_topk(x[None], 2)[0],
    "a module": lambda x: torch.nn.Linear(3, 2).to(x.device)(x),
}


@pytest.mark.parametrize("make", ALLOWED.values(), ids=ALLOWED)
def test_what_follows_from_a_tensor_is_there_too(there, make):
    x = torch.tensor([3.0, 1.0, 2.0]).to(there)
    assert x.device == there and make(x).device == there and not make(x).is_cpu
    assert x.cpu().device.type == "cpu" and x.device == there


REFUSED = {
    "a sum": lambda x: x + torch.zeros(3),
    "a list on the CPU": lambda x: x.gather(0, torch.tensor([0])),
    "a module on the CPU": lambda x: torch.nn.Linear(3, 2)(x),
    "a value": lambda x: x.index_put((torch.tensor([0]),), torch.zeros(1)),
    "arguments of an op of ours": lambda x: vlmprune.ops.gather_tokens(
        [x.view(1, 3)], torch.zeros(1, 1).long()
    ),
}


@pytest.mark.parametrize("mix", REFUSED.values(), ids=REFUSED)
def test_what_mixes_is_refused(there, mix):
    with pytest.raises(
        (RuntimeError, vlmprune.InputError), match=r"expected .*, got .* on cpu$|got privateuseone:0$"
    ):
        mix(torch.tensor([3.0, 1.0, 2.0]).to(there))


def test_numpy_is_refused_as_on_a_gpu(there):
    with pytest.raises(TypeError, match="can't convert privateuseone:0 tensor to numpy"):
        torch.zeros(3).to(there).numpy()


def test_a_pruned_prefill_runs_there(there):
    """A method that forgets where its context is, does not."""
    model, batch = make_model().to(there), {name: x.to(there) for name, x in make_batch([["I", 5]]).items()}
    with torch.no_grad(), vlmprune.prune(model, vlmprune.Feather(layers=(2, 4), keep=0.5)) as run:
        assert model(**batch).logits.device == there
    assert {stage.index.device for stage in run.stages} == {there}
    lost = vlmprune.Custom(2, lambda ctx: torch.arange(3)[None])
    with (
        torch.no_grad(),
        vlmprune.prune(model, lost),
        pytest.raises(vlmprune.InputError, match="on privateuseone:0"),
    ):
        model(**batch)


def test_a_test_makes_its_tensors_on_its_device_and_the_package_does_not(request, there):
    with device.tensors_on(there, request.module):
        assert torch.ones(2).device == there and torch.ones(2, device="cpu").device.type == "cpu"
        assert make_batch([["I", 5]])["input_ids"].device == there
        assert next(make_model().parameters()).device == there
    assert torch.ones(2).device.type == "cpu" and vlmprune.ops.reference.torch is torch


def test_cuda_that_is_not_there_is_one_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match=r"^--device: expected cpu or pretend, .*, got cuda$"):
        device.chosen("cuda")
    assert device.chosen(None) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device.chosen("cuda") == device.chosen(None) == "cuda" and device.chosen("cpu") == "cpu"
