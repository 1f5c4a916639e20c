"""``earlier_kv="compact"``: decoding forgets, in the layers before the last stage too, what that stage dropped."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import StaticCache

import vlmprune
from helpers.tiny import LAYERS, dropped_from, generate, make_batch, make_model, oracle

ONE = [[4, "I", 7]]
PADDED = [["I", 9, "I", 4], [3, "I", 5], [12]]
FASTV = vlmprune.FastV(layer=2, keep=3, earlier_kv="compact")
THREE = vlmprune.Stages(
    [vlmprune.Random(layer=1, keep=0.7), vlmprune.Random(layer=3, keep=0.5), vlmprune.FastV(layer=4, keep=2)],
    earlier_kv="compact",
)


@pytest.fixture(scope="module")
def model():
    return make_model()


@contextmanager
def forgotten(model, columns):
    """On top of the oracle's masks: rows behind the prompt do not see ``columns [B, S0]`` in any layer."""
    start = columns.shape[1]

    def before(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        hidden = mask[:, :, start:, :start]
        mask[:, :, start:, :start] = hidden.masked_fill(columns[:, None, None], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    layers = model.model.language_model.layers
    handles = [layer.self_attn.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        [handle.remove() for handle in handles]


def expected(model, batch, dropped, steps):
    with forgotten(model, dropped[max(dropped)]):
        return oracle(model, batch, dropped, steps)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("specs", [ONE, PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("policy", [FASTV, THREE], ids=["one-stage", "three-stages"])
def test_equals_the_oracle(attn, specs, policy):
    model, batch = make_model(attn=attn), make_batch(specs)
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, 5)
    want = expected(model, batch, dropped_from(run, batch), 5)
    assert torch.equal(tokens, want[0])
    torch.testing.assert_close(logits, want[1], rtol=0, atol=1e-4)


def test_second_turn_equals_the_oracle(model):
    batch = make_batch(PADDED)
    with vlmprune.prune(model, THREE) as run:
        tokens, _, out = generate(model, batch, 3)
        dropped = dropped_from(run, batch)
        ids = torch.cat([batch["input_ids"], tokens, torch.tensor([[5, 6]] * 3)], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
        text = {"input_ids": ids, "attention_mask": mask}
        got = generate(model, text, 4, past_key_values=out.past_key_values)
    want = expected(model, {**text, "pixel_values": batch["pixel_values"]}, dropped, 4)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("specs", [ONE, PADDED], ids=["one", "padded"])
def test_memory_is_freed(model, specs):
    """Measured on the storage of the tensors: nothing keeps the longer ones alive."""
    batch, held, bytes_ = make_batch(specs), {}, {}
    for how in ("full", "compact"):
        with vlmprune.prune(model, vlmprune.Random(layer=4, keep=0.25, earlier_kv=how)) as run:
            _, _, out = generate(model, batch, 1)
        layers = out.past_key_values.layers
        held[how] = [layer.keys.shape[2] for layer in layers]
        bytes_[how] = sum(
            x.untyped_storage().nbytes() for layer in layers for x in (layer.keys, layer.values)
        )
        assert (
            run.report().kv_bytes == bytes_[how] == 2 * len(batch["input_ids"]) * 4 * 8 * 4 * sum(held[how])
        )
        assert run.report().as_dict()["kv_bytes"] == bytes_[how]
        assert out.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    assert held["full"] == [*[batch["input_ids"].shape[1]] * 4, *held["full"][4:]]
    assert held["compact"] == [held["full"][-1]] * LAYERS
    visual = run.report().tokens
    assert visual.resident_kv == visual.after_last_stage < visual.mean_per_layer


def test_a_static_cache_is_compacted_in_place(model):
    """The allocation stays as it is, so no memory is freed; the freed entries are written next."""
    cache = StaticCache(config=model.config, max_cache_len=40)
    with vlmprune.prune(model, FASTV) as run:
        generate(model, make_batch(ONE), 3, past_key_values=cache)
    assert [int(layer.stored()) for layer in cache.layers] == [28 - 16 + 3 + 2] * LAYERS
    assert run.report().kv_bytes == 2 * 4 * 40 * 8 * 4 * LAYERS


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_generation_features_find_a_compacted_cache(model, static):
    """Candidates are cropped off again, beams reorder, chunks compact one after the other."""
    kind = {"cache_implementation": "static"} if static else {}
    one, batch = make_batch(ONE), make_batch(PADDED)
    with vlmprune.prune(model, FASTV):
        greedy, *_ = generate(model, one, 6)
        if not static:  # transformers decodes speculatively with croppable caches only
            assert torch.equal(generate(model, one, 6, prompt_lookup_num_tokens=3)[0], greedy)
        elif Version(transformers.__version__) >= Version(
            "5.18"
        ):  # before it, chunked prefill loses the images
            chunks = [generate(model, one, 6, prefill_chunk_size=9, **k)[0] for k in ({}, kind)]
            assert torch.equal(*chunks)
        beams = [generate(model, batch, 6, num_beams=3, **k)[2].sequences for k in ({}, kind)]
        assert torch.equal(*beams)
        assert beams[0].shape == (3, batch["input_ids"].shape[1] + 6)


def test_an_unpruned_run_is_measured_too(model):
    with vlmprune.meter(model) as run:
        generate(model, make_batch(ONE), 2)
    assert run.report().kv_bytes == 2 * 4 * 28 * 8 * 4 * LAYERS
    with vlmprune.prune(model, FASTV) as run:
        generate(model, make_batch(ONE), 1, use_cache=False)
    assert run.report().kv_bytes == 0
