"""``attn_implementation="vlmprune"`` equals sdpa, keeps a right log-sum-exp, and pruning works on FlashAttention models.

The flash-attn packages are stand-ins in plain PyTorch (``helpers.fake_flash``): what runs on a GPU is not measured here.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import vlmprune
from helpers.attention import Wants, doubled, draw, layer, logits_of, lower_right
from helpers.tiny import IMAGE, dropped_from, generate, make_batch, make_model, oracle
from vlmprune.models.attention.backend import attention

BATCHES = {"one": [["I", 7]], "padded": [["I", 9, "I", 4], [3, "I", 5], [12]]}
STEPS = 4


CASES = {
    "prefill": ((2, 8, 4, 17, 17, 24), None, True),
    "padded": ((2, 8, 4, 17, 17, 24), lower_right(17, 17, (0, 5)), True),
    "chunk after a cache": ((2, 8, 2, 5, 19, 16), lower_right(5, 19, (3, 0)), True),
    "decode": ((2, 8, 4, 1, 19, 16), None, True),
    "padded decode": ((2, 8, 4, 1, 19, 16), lower_right(1, 19, (0, 4)), True),
    "preallocated cache": ((2, 4, 4, 9, 32, 16), None, True),
    "vision tower": ((3, 4, 4, 17, 17, 12), None, False),
    "added mask": (
        (2, 4, 4, 7, 7, 16),
        torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(1)),
        True,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("want_lse", [False, True], ids=["plain", "lse"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.cpu("torch's kernel for CPUs; test_flash.py has the others")
def test_equals_sdpa_and_the_definition_of_lse(case, want_lse, dtype):
    shape, seen, causal = CASES[case]
    q, k, v = draw(*shape, dtype)
    seen = seen.to(dtype) if seen is not None and seen.dtype != torch.bool else seen
    module = layer(shape[1], shape[2], causal)
    wants = Wants()
    more = {"vlmprune": wants} if want_lse else {}
    got, weights = attention(module, q, k, v, seen, scaling=0.3, **more)
    want = sdpa_attention_forward(module, q, k, v, seen, scaling=0.3)[0]
    exact = sdpa_attention_forward(module, *(x.double() for x in (q, k, v)), doubled(seen), scaling=0.3)[0]
    allowed = 2 * (want.double() - exact).abs().max().item() + 1e-6
    assert weights is None
    assert got.dtype == dtype and got.is_contiguous() and got.shape == want.shape
    torch.testing.assert_close(got.double(), exact, atol=allowed, rtol=0)
    assert list(wants.lse) == ([3] if want_lse else [])
    if want_lse:
        logits, real = logits_of(q, k, seen, causal)
        want_lse = logits.logsumexp(-1)
        assert wants.lse[3].dtype == torch.float32 and wants.lse[3].shape == want_lse.shape
        near = 1e-5 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(wants.lse[3].double()[real], want_lse[real], atol=near, rtol=0)


def test_a_vision_layer_without_a_number_is_left_to_sdpa():
    q, k, v = draw(2, 4, 4, 9, 9, 16, torch.float32)
    module = SimpleNamespace(is_causal=False)
    got = attention(module, q, k, v, None, scaling=0.25)[0]
    assert torch.equal(got, sdpa_attention_forward(module, q, k, v, None, scaling=0.25)[0])


@pytest.mark.real("SDPA drops in C++")
def test_dropout_keeps_no_lse_and_is_sdpas():
    q, k, v = draw(2, 8, 4, 17, 17, 24, torch.float32)
    wants = Wants()
    torch.manual_seed(5)
    got = attention(layer(8, 4), q, k, v, None, dropout=0.5, scaling=0.3, vlmprune=wants)[0]
    torch.manual_seed(5)
    assert torch.equal(got, sdpa_attention_forward(layer(8, 4), q, k, v, None, dropout=0.5, scaling=0.3)[0])
    assert not wants.lse


def test_gradients_equal_sdpas():
    grads = []
    for more in ({}, {"vlmprune": Wants()}):
        leaves = [x.requires_grad_() for x in draw(2, 8, 4, 9, 9, 16, torch.float32)]
        attention(layer(8, 4), *leaves, lower_right(9, 9, (0, 2)), scaling=0.3, **more)[0].sum().backward()
        grads.append([x.grad for x in leaves])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_models_that_change_the_softmax_are_refused(name):
    q, k, v = draw(1, 4, 4, 5, 5, 16, torch.float32)
    with pytest.raises(
        ValueError, match=f"{name}: expected None with attn_implementation='vlmprune', got a value"
    ):
        attention(layer(4, 4), q, k, v, None, **{name: 30.0})


# Whole models


@pytest.mark.parametrize("specs", BATCHES)
def test_model_equals_sdpa_with_and_without_pruning(specs):
    batch, models = make_batch(BATCHES[specs]), (make_model(), make_model(attn="vlmprune"))
    plain = [generate(model, batch, STEPS)[:2] for model in models]
    torch.testing.assert_close(plain[0][1], plain[1][1], atol=2e-5, rtol=0)
    policy = vlmprune.Stages(
        [vlmprune.FastV(layer=2, keep=0.5, rows="mean"), vlmprune.FastV(layer=4, keep=0.5)]
    )
    runs = []
    for model in models:
        with vlmprune.prune(model, policy) as run:
            tokens, logits, _ = generate(model, batch, STEPS)
        runs.append((tokens, logits, dropped_from(run, batch)))
    assert all(torch.equal(runs[0][2][i], runs[1][2][i]) for i in runs[0][2])
    torch.testing.assert_close(runs[0][1], runs[1][1], atol=2e-5, rtol=0)
    want_tokens, want_logits, _ = oracle(models[0], batch, runs[1][2], STEPS)
    torch.testing.assert_close(runs[1][1], want_logits, atol=1e-4, rtol=0)
    assert torch.equal(runs[1][0], want_tokens)


def test_second_turn_with_a_new_image_equals_sdpa():
    batch, more = make_batch([[9], [5]]), make_batch([["I", 3], ["I", 3]], seed=3)
    policy, logits, seen = vlmprune.FastV(layer=2, keep=0.5, rows="mean"), [], []
    for attn in ("sdpa", "vlmprune"):
        model = make_model(attn=attn)
        with vlmprune.prune(model, policy) as run:
            _, _, first = generate(model, batch, STEPS)
            again = next_turn(batch, first, more)
            logits.append(generate(model, again, STEPS, past_key_values=first.past_key_values)[1])
            seen.append(run.stages[0].index)
    assert torch.equal(*seen)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=0)


def next_turn(batch, first, more):
    ids = torch.cat([first.sequences, more["input_ids"]], 1)
    real = torch.ones_like(ids)
    real[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": real, "pixel_values": more["pixel_values"]}


def test_loss_and_gradients_of_a_pruned_model_equal_sdpas():
    batch, grads = make_batch([["I", 6]]), []
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    for attn in ("sdpa", "vlmprune"):
        model = make_model(attn=attn)
        with vlmprune.prune(model, vlmprune.FastV(layer=2, keep=0.5)):
            model(**batch).loss.backward()
        grads.append(model.model.language_model.layers[1].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_from_pretrained_takes_the_name_for_all_or_for_the_text_model(tmp_path):
    model, batch = make_model(), make_batch(BATCHES["one"])
    model.save_pretrained(tmp_path)
    want = generate(model, batch, 2)[1]
    for asked, tower in (("vlmprune", "vlmprune"), ({"text_config": "vlmprune"}, "sdpa")):
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=asked).eval()
        assert loaded.config.text_config._attn_implementation == "vlmprune"
        assert loaded.config.vision_config._attn_implementation == tower
        loaded.generation_config.eos_token_id = None
        torch.testing.assert_close(generate(loaded, batch, 2)[1], want, atol=2e-5, rtol=0)


def test_static_cache_decodes_in_one_compiled_graph():
    model, batch = make_model(attn="vlmprune"), make_batch(BATCHES["padded"])
    want = generate(model, batch, 3)[1]
    got = generate(model, batch, 3, cache_implementation="static", disable_compile=True)[1]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    module, (q, k, v) = layer(8, 4), draw(2, 8, 4, 1, 12, 16, torch.float32)
    seen = lower_right(1, 12, (0, 4))
    compiled = torch.compile(
        lambda q, k, v: attention(module, q, k, v, seen, scaling=0.3)[0], fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(q, k, v), attention(module, q, k, v, seen, scaling=0.3)[0])
