"""Loss and gradients of a pruned model: the oracle's, and the same with checkpointed layers."""

from __future__ import annotations

import threading

import pytest
import torch

import vlmprune
from helpers.tiny import IMAGE, dropped_from, make_batch, make_model, masked

FASTV = vlmprune.FastV(layer=2, keep=0.4)


@pytest.fixture(scope="module")
def model():
    return make_model()


def labels_for(batch):
    """Every text token, those right after an image too: their logits come from a visual row."""
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    return labels.masked_fill(batch["attention_mask"] == 0, -100)


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


CAPTIONED = {
    "random": vlmprune.Random(layer=2, keep=0.25),
    "fastv": vlmprune.FastV(layer=2, keep=0.25),
    "two-stages": vlmprune.PyramidDrop(layers=(2, 4), positions="keep"),
    "none": vlmprune.VTW(layer=2),
    "before": vlmprune.Random(layer=0, keep=1),
}


@pytest.mark.parametrize("policy", CAPTIONED.values(), ids=CAPTIONED)
def test_a_label_right_behind_an_image_is_learned(model, policy):
    """LLaVA's first stage trains on "<image>caption": the caption's first token is predicted by the image's last row."""
    batch = make_batch([["I", 9], ["I", 4, "I", 4]], seed=3, pad="right")
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    labels = labels_for(batch)
    visual = batch["input_ids"] == IMAGE
    before_text = visual[:, :-1] & ~visual[:, 1:]
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        out = model(**batch, labels=labels, use_cache=False)
    dropped = dropped_from(run, batch)
    assert not any((hidden[:, :-1] & before_text).any() for hidden in dropped.values())
    with torch.no_grad(), masked(model, dropped):
        want = model(**batch, labels=labels, use_cache=False)
    torch.testing.assert_close(out.loss, want.loss, atol=1e-5, rtol=0)
    rows = torch.nn.functional.pad(before_text, (0, 1))
    torch.testing.assert_close(out.logits[rows], want.logits[rows], atol=1e-4, rtol=0)


def test_a_training_loop_that_keeps_its_labels_to_itself():
    """Without labels in the call every row before text may be trained on; outside training nothing is added."""
    model, batch = make_model(), make_batch([["I", 9]])
    policy = vlmprune.Custom(2, lambda ctx: torch.arange(4)[None])
    with vlmprune.prune(model.train(), policy) as run:
        model(**batch, use_cache=False)
        assert run.kept().tolist() == [0, 1, 2, 15]
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        model(**batch, use_cache=False)
        assert run.kept().tolist() == [0, 1, 2, 3]
    with (
        pytest.raises(ValueError, match=r"^labels: expected .* as the tokens, got"),
        vlmprune.prune(model, policy),
    ):
        model(**batch, labels=batch["input_ids"][:, :5])


TRAINED = {
    "fastv": FASTV,
    "own": vlmprune.PyramidDrop(layers=(2, 4), positions="pack"),
    "merged": vlmprune.VisionZip(positions="pack"),
    "v2drop": vlmprune.V2Drop(layers=(2, 4), keep=(0.5, 3)),
}


@pytest.mark.parametrize("policy", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.real("torch.utils.checkpoint asks for its random state")
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


@pytest.mark.real("torch.utils.checkpoint asks for its random state")
def test_layers_replayed_by_another_thread(monkeypatch):
    """As autograd's own thread does on a GPU: it has no prompt under way whose time it could measure."""
    monkeypatch.setattr(threading, "excepthook", lambda failed: None)  # what fails leaves no gradient
    model, batch = make_model(), make_batch([[4, "I", 7]])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with vlmprune.prune(model, FASTV) as run:
        loss = model(**batch, labels=labels_for(batch), use_cache=False).loss
        elsewhere = threading.Thread(target=loss.backward)
        elsewhere.start()
        elsewhere.join()
    assert all(p.grad is not None for p in model.get_decoder().layers.parameters())
    assert run.report().seconds.selection > 0
