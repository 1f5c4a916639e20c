"""A pruned run equals the unpruned run with the pruned columns masked, from the first logit to the last token."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.tiny import (
    DECODERS,
    IMAGE,
    STEPS,
    TOLERANCE,
    TOWERS,
    Drawn,
    assert_equals_oracle,
    dropped_from,
    generate,
    make_batch,
    make_model,
    oracle,
)

BATCHES = {
    "one": [[4, "I", 7]],
    "two-images": [[2, "I", 3, "I", 5]],
    "image-last": [[3, "I"]],
    "padded-2": [[4, "I", 7], [2, "I", 3]],
    "padded-2-1-0-images": [["I", 9, "I", 4], [3, "I", 5], [12]],
    "text-longest": [[50], [2, "I", 3]],
    "equal": [[4, "I", 7], [5, "I", 6]],
}


POLICIES = {
    "fastv": vlmprune.FastV(layer=2, keep=0.4),
    "fastv-mean-rows": vlmprune.FastV(layer=3, keep=6, rows="mean"),
    "feather": vlmprune.Feather(layers=(2, 4), keep=0.5, stride=3),
    "random-layer-0": vlmprune.Random(layer=0, keep=0.3),
    "uniform": vlmprune.Uniform(layer=1, keep=0.25),
    "union": vlmprune.FastV(layer=2, keep=0.2) | vlmprune.Uniform(layer=2, keep=None, stride=2),
    "stages": vlmprune.Stages(
        [
            vlmprune.FastV(layer=1, keep=0.8),
            vlmprune.Random(layer=3, keep=0.5),
            vlmprune.FastV(layer=5, keep=0.3),
        ]
    ),
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return make_model(attn=request.param)


@pytest.mark.parametrize("layers", [(2,), (0,), (1, 3, 5), (5,)], ids=str)
@pytest.mark.parametrize("specs", BATCHES.values(), ids=BATCHES)
def test_drawn_sets(model, specs, layers):
    batch = make_batch(specs)
    with vlmprune.prune(model, Drawn(layers)) as run:
        tokens, logits, _ = generate(model, batch, STEPS)
    assert [stage.layer for stage in run.stages] == list(layers)
    assert run.stages[-1].tokens_kept < (batch["input_ids"] == IMAGE).sum(1).max()
    assert_equals_oracle(model, batch, run, tokens, logits)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("specs", ["one", "padded-2-1-0-images"])
def test_policies(model, specs, policy):
    batch = make_batch(BATCHES[specs])
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, STEPS)
    assert run.stages[0].tokens_kept < run.stages[0].tokens_in
    assert_equals_oracle(model, batch, run, tokens, logits)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_families(decoder, tower):
    model = make_model(decoder, tower)
    batch = make_batch(BATCHES["padded-2-1-0-images"])
    with vlmprune.prune(model, vlmprune.Feather(layers=(2, 4), keep=0.5)) as run:
        tokens, logits, _ = generate(model, batch, STEPS)
    assert_equals_oracle(model, batch, run, tokens, logits)


@pytest.mark.parametrize("specs", ["one", "padded-2-1-0-images"])
def test_without_cache(model, specs):
    """Every step is a prefill that prunes anew; with drawn sets the choice stays the same, so the oracle still fits."""
    batch = make_batch(BATCHES[specs])
    with vlmprune.prune(model, Drawn((2, 4))) as run:
        tokens, logits, _ = generate(model, batch, STEPS, use_cache=False)
    assert_equals_oracle(model, batch, run, tokens, logits)


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("specs", ["one", "padded-2-1-0-images"])
def test_prefill_logits_of_every_kept_row(model, specs, pad):
    """One forward without generate: rows come back at their own positions, also with padding on the right."""
    batch = make_batch(BATCHES[specs], pad=pad)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    policy = vlmprune.FastV(layer=2, keep=0.4)
    with torch.no_grad(), vlmprune.prune(model, policy) as run:
        logits = model(**batch, position_ids=positions, use_cache=False).logits
    dropped = dropped_from(run, batch)
    want = oracle(model, batch, dropped, 1)[2]
    seen = batch["attention_mask"].bool() & ~dropped[2]
    torch.testing.assert_close(logits[seen], want[seen], atol=TOLERANCE, rtol=0)
    assert logits.shape == want.shape


def second_turn(batch, first, text: int, pad_second: bool = False):
    """The first turn's sequences plus new text tokens, as a follow-up question."""
    generator = torch.Generator().manual_seed(7)
    new = torch.randint(3, 198, (len(first), text), generator=generator)
    ids = torch.cat([first, new], 1)
    grown = ids.shape[1] - batch["attention_mask"].shape[1]
    real = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(len(ids), grown)], 1)
    if pad_second:
        real[0, -text : -text + 2] = 0
    return {"input_ids": ids, "attention_mask": real}


@pytest.mark.parametrize("layers", [(2,), (0,), (1, 4)], ids=str)
@pytest.mark.parametrize("specs", ["one", "padded-2", "padded-2-1-0-images"])
@pytest.mark.parametrize("pad_second", [False, True])
def test_second_turn_from_the_returned_cache(model, specs, layers, pad_second):
    batch = make_batch(BATCHES[specs])
    with vlmprune.prune(model, Drawn(layers)) as run:
        _, _, first = generate(model, batch, STEPS)
        dropped = dropped_from(run, batch)
        again = second_turn(batch, first.sequences, 5, pad_second)
        tokens, logits, _ = generate(model, again, STEPS, past_key_values=first.past_key_values)
    again["pixel_values"] = batch["pixel_values"]
    want_tokens, want_logits, _ = oracle(model, again, dropped, STEPS)
    torch.testing.assert_close(logits, want_logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, want_tokens)


def test_second_turn_with_a_new_image(model):
    """Turn 1 is unpruned text, padded; turn 2 brings an image that is pruned against keys of both turns."""
    batch = make_batch([[9], [5]])
    more = make_batch([["I", 3], ["I", 3]], seed=3)
    policy = vlmprune.Stages([vlmprune.FastV(layer=2, keep=0.5), Drawn((4,))])
    with vlmprune.prune(model, policy) as run:
        _, _, first = generate(model, batch, STEPS)
        ids = torch.cat([first.sequences, more["input_ids"]], 1)
        real = torch.ones_like(ids)
        real[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
        again = {"input_ids": ids, "attention_mask": real, "pixel_values": more["pixel_values"]}
        tokens, logits, _ = generate(model, again, STEPS, past_key_values=first.past_key_values)
    visual = ids == IMAGE
    past = ids.shape[1] - more["input_ids"].shape[1] - 1  # the last token of turn 1 is not cached yet
    dropped = {}
    for stage in run.stages:
        kept = torch.zeros_like(visual)
        kept.scatter_(1, stage.index + past, True)
        dropped[stage.layer] = visual & ~kept
    want_tokens, want_logits, _ = oracle(model, again, dropped, STEPS)
    torch.testing.assert_close(logits, want_logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, want_tokens)


KEEP_ALL = {
    "fastv": vlmprune.FastV(layer=2, keep=1.0),
    "feather": vlmprune.Feather(layers=(2, 4), keep=1.0),
    "count": vlmprune.Random(layer=0, keep=10_000),
    "uniform": vlmprune.Uniform(layer=3, keep=1.0),
}


@pytest.mark.parametrize("policy", KEEP_ALL.values(), ids=KEEP_ALL)
@pytest.mark.parametrize("specs", ["one", "padded-2-1-0-images"])
def test_keep_all_is_bit_equal_to_the_unpatched_model(model, specs, policy):
    batch = make_batch(BATCHES[specs])
    tokens, logits, _ = generate(model, batch, STEPS)
    with vlmprune.prune(model, policy) as run:
        pruned_tokens, pruned_logits, out = generate(model, batch, STEPS)
    assert torch.equal(logits, pruned_logits)
    assert torch.equal(tokens, pruned_tokens)
    assert run.stages[-1].tokens_kept == run.stages[0].tokens_in
    assert {type(layer).__name__ for layer in out.past_key_values.layers} == {"DynamicLayer"}


@pytest.mark.parametrize("specs", [[[12]], [[12], [5]]], ids=["one", "padded"])
def test_text_only_is_an_exact_no_op(model, specs):
    batch = make_batch(specs)
    tokens, logits, _ = generate(model, batch, STEPS)
    with vlmprune.prune(model, vlmprune.Feather(layers=(2, 4))) as run:
        pruned_tokens, pruned_logits, out = generate(model, batch, STEPS)
    assert torch.equal(logits, pruned_logits)
    assert torch.equal(tokens, pruned_tokens)
    assert run.stages == []
    assert {type(layer).__name__ for layer in out.past_key_values.layers} == {"DynamicLayer"}


def test_a_generated_placeholder_is_text(model):
    """Only calls that bring images have visual tokens: a placeholder id without one is an ordinary token."""
    batch = make_batch([[6]])
    batch["input_ids"][0, 3] = IMAGE
    with torch.no_grad():
        plain = model(**batch).logits
        with vlmprune.prune(model, vlmprune.FastV(layer=2, keep=0.1)) as run:
            pruned = model(**batch).logits
    assert torch.equal(plain, pruned)
    assert run.stages == []


def test_user_supplied_cache_without_config(model):
    from transformers import DynamicCache

    batch = make_batch(BATCHES["one"])
    with vlmprune.prune(model, Drawn((3,))) as run:
        tokens, logits, _ = generate(model, batch, STEPS, past_key_values=DynamicCache())
    assert_equals_oracle(model, batch, run, tokens, logits)


def test_training_step_matches_the_oracle():
    """Loss and gradients flow through the gathers and equal the masked run's.

    The label right after an image is left out: its logits come from a visual row, which may be pruned.
    """
    from helpers.tiny import masked

    model = make_model()
    batch = make_batch(BATCHES["padded-2"], pad="right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(batch["input_ids"][:, :-1] == IMAGE, -100)
    weight = model.model.multi_modal_projector.linear_2.weight
    with vlmprune.prune(model, Drawn((2,))) as run:
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
    grad, weight.grad = weight.grad.clone(), None
    with masked(model, dropped_from(run, batch)):
        want = model(**batch, labels=labels, use_cache=False).loss
        want.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(grad, weight.grad, atol=1e-4, rtol=1e-3)
