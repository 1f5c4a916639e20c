"""What stands around a pruned call - precision, autograd mode, copies, compiled code, errors - changes nothing and stays."""

from __future__ import annotations

import copy
from operator import is_

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import vlmprune
from helpers.tiny import IMAGE, dropped_from, generate, make_batch, make_model, oracle
from vlmprune.errors import ModelError

ONE = [[4, "I", 7]]
PADDED = [["I", 9, "I", 4], [3, "I", 5], [12]]
FASTV = vlmprune.FastV(layer=2, keep=0.4)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("attn", ["sdpa", "eager", "vlmprune"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(attn, dtype):
    """The choice is made in this precision too, so the oracle masks what was really dropped."""
    model, batch = make_model(attn=attn).to(dtype), make_batch(PADDED)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with vlmprune.prune(model, vlmprune.FastV(layer=2, keep=0.4, rows="mean")) as run:
        _, logits, _ = generate(model, batch, 1)
    exact = copy.deepcopy(model).float()
    wide = {**batch, "pixel_values": batch["pixel_values"].float()}
    want = oracle(exact, wide, dropped_from(run, batch), 1)[1]
    error = (oracle(model, batch, dropped_from(run, batch), 1)[1].float() - want).abs().max()
    assert (logits.float() - want).abs().max() <= 2 * error


@pytest.mark.parametrize("earlier_kv", ["full", "compact"])
def test_autocast(model, earlier_kv):
    batch, policy = make_batch(PADDED), vlmprune.FastV(layer=2, keep=0.4, earlier_kv=earlier_kv)
    with torch.autocast("cpu", torch.bfloat16):
        with vlmprune.prune(model, policy) as run:
            _, logits, _ = generate(model, batch, 3)
        masked = oracle(model, batch, dropped_from(run, batch), 1)[1]
    want = oracle(model, batch, dropped_from(run, batch), 1)[1]
    assert (logits[:, :1] - want).abs().max() <= 2 * (masked - want).abs().max()


def test_a_cache_made_in_inference_mode_goes_on_outside(model):
    batch, cache, token = make_batch(PADDED), DynamicCache(), torch.full((3, 1), 7)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
    step = {"input_ids": token, "attention_mask": mask, "position_ids": mask.sum(1)[:, None] - 1}
    policy, logits = vlmprune.FastV(layer=2, keep=0.4, earlier_kv="compact"), []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = DynamicCache()
        with vlmprune.prune(model, policy):
            with mode():
                model(**batch, past_key_values=cache)
            with torch.no_grad():
                logits.append(model(**step, past_key_values=cache).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("policy", [FASTV, vlmprune.VisionZip(positions="pack")], ids=["fastv", "visionzip"])
def test_a_copy_of_an_attached_model_prunes_for_itself(policy):
    model, batch = make_model(), make_batch(ONE)
    run = vlmprune.attach(model, policy)
    _, want, _ = generate(model, batch, 3)
    report, stages = run.report(), run.stages
    other = copy.deepcopy(model)
    vlmprune.detach(model)
    plain = generate(model, batch, 3)[1]
    assert torch.equal(generate(other, batch, 3)[1], want)
    generate(other, make_batch(PADDED), 2)
    assert all(map(is_, run.stages, stages)) and run.report() == report  # not the copy's
    vlmprune.detach(other)
    assert torch.equal(generate(other, batch, 3)[1], plain)


def test_generate_from_embeddings_and_pixels(model):
    """generate() then hands over embeddings once, and ids from the first new token on."""
    batch = make_batch(PADDED)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    with vlmprune.prune(model, FASTV) as run:
        _, want, _ = generate(model, batch, 4)
        kept = run.stages[0].index
        del batch["input_ids"]
        _, got, _ = generate(model, {**batch, "inputs_embeds": embeds}, 4)
    assert torch.equal(got, want)
    assert torch.equal(run.stages[0].index, kept)


def test_a_vision_tower_that_ran_without_hooks_is_named():
    """So it is where torch.compile has compiled the tower before the scope began."""
    model, batch = make_model(), make_batch(ONE)
    with pytest.raises(
        ModelError, match=r"^vision tower: expected it to run with its hooks, got a run without"
    ):
        with torch.no_grad(), vlmprune.prune(model, FASTV):
            model.model.vision_tower._forward_hooks.clear()
            model(**batch)


def test_an_error_in_a_layer_leaves_registries_as_they_were_and_a_cache_that_resets(model):
    tables = [AttentionInterface, AttentionMaskInterface]
    before = [{**table._global_mapping, **table()._local_mapping} for table in tables]
    batch, cache = make_batch(PADDED), DynamicCache(config=model.config)
    want = generate(model, batch, 2)[1]

    def explode(*args):
        raise MemoryError("out of memory")

    handle = model.model.language_model.layers[4].self_attn.register_forward_pre_hook(explode)
    with pytest.raises(MemoryError), vlmprune.prune(model, FASTV):
        generate(model, batch, 2, past_key_values=cache)
    handle.remove()
    assert [{**table._global_mapping, **table()._local_mapping} for table in tables] == before
    cache.reset()
    assert all(type(layer) is type(DynamicCache(config=model.config).layers[0]) for layer in cache.layers)
    assert not any({"dropped", "valid", "shift", "pending"} & {*vars(layer)} for layer in cache.layers)
    assert torch.equal(generate(model, batch, 2)[1], want)


def test_candidates_behind_a_prompt_are_no_chunk_of_it(model):
    """Speculative decoding asks for the logits of all it hands over; a chunk of a prompt does not."""
    batch, cache = make_batch(ONE), DynamicCache()
    with torch.no_grad(), vlmprune.prune(model, FASTV) as run:
        model(**batch, past_key_values=cache, logits_to_keep=1)
        flops, tokens = run.report().flops, run.report().tokens
        candidates = torch.tensor([[5, 6, 7]])
        mask = torch.ones(1, 28 + 3, dtype=torch.long)
        model(input_ids=candidates, attention_mask=mask, past_key_values=cache, logits_to_keep=3)
    report = run.report()
    assert (report.flops, report.tokens, report.decode_steps) == (flops, tokens, 1)
    assert (batch["input_ids"] == IMAGE).sum() == report.visual_tokens
