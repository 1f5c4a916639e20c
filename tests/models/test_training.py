"""Loss and gradients of a pruned model: the oracle's, and the same with checkpointed layers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import vlmprune

sys.path.append(str(Path(__file__).parent))
from _tiny import IMAGE, dropped_from, make_batch, make_model, masked

FASTV = vlmprune.FastV(layer=2, keep=0.4)


@pytest.fixture(scope="module")
def model():
    return make_model()


def labels_for(batch):
    """The label right after an image is left out: its logits come from a visual row, which may be pruned."""
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(batch["input_ids"][:, :-1] == IMAGE, -100)
    return labels


@pytest.mark.parametrize("pad", ["left", "right"])
def test_the_loss_is_the_oracles(model, pad):
    batch = make_batch([[4, "I", 7], [2, "I", 3]], pad=pad)
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    labels = labels_for(batch)
    with torch.no_grad(), vlmprune.prune(model, FASTV) as run:
        loss = model(**batch, labels=labels, use_cache=False).loss
    with torch.no_grad(), masked(model, dropped_from(run, batch)):
        want = model(**batch, labels=labels, use_cache=False).loss
        plain = model(**batch, labels=labels, use_cache=False, logits_to_keep=0).loss
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=0)
    assert torch.equal(want, plain)


TRAINED = {"fastv": FASTV, "own": vlmprune.PyramidDrop(layers=(2, 4)), "merged": vlmprune.VisionZip()}


@pytest.mark.parametrize("policy", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(policy, reentrant):
    """transformers 5.17 replays the hooks in the backward pass; the stages must not choose, nor gather, twice."""
    model = make_model()
    batch = make_batch([[4, "I", 7], [2, "I", 3]], pad="right")
    labels, grads = labels_for(batch), []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with vlmprune.prune(model, policy) as run:
            model(**batch, labels=labels, use_cache=False).loss.backward()
        assert run.stages[0].tokens_kept < run.stages[0].tokens_in or policy is TRAINED["merged"]
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert grads[0].keys() == grads[1].keys() != set()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
