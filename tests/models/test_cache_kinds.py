"""Pruning with every kind of KV cache transformers has: the same tokens and logits as with the default one."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer

import vlmprune
from helpers.caches import rounded_cache, without_streams
from helpers.tiny import LAYERS, dropped_from, generate, make_batch, make_model, oracle
from vlmprune.errors import ModelError

ONE = [[4, "I", 7]]
PADDED = [["I", 9, "I", 4], [3, "I", 5], [12]]
SAVES_KEYS = vlmprune.FastV(layer=2, keep=0.5)  # scores from the cache
PACKS = vlmprune.PyramidDrop(
    layers=(1, 3), positions="pack"
)  # scores ahead of it, two stages, packed positions
ATOL = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def model():
    return make_model()


def pruned(model, batch, policy, steps=5, **kwargs):
    """Greedy pruned decoding: tokens, logits, raw output, run."""
    with vlmprune.prune(model, policy) as run:
        return *generate(model, batch, steps, **kwargs), run


def same(got, want):
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], **ATOL)


# Static


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("specs", [ONE, PADDED], ids=["one", "padded"])
def test_static_cache_equals_the_oracle(attn, specs):
    model, batch = make_model(attn=attn), make_batch(specs)
    *got, run = pruned(model, batch, SAVES_KEYS, cache_implementation="static")
    same(got, oracle(model, batch, dropped_from(run, batch), 5))


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_static_cache_with_packed_positions(decoder):
    """qwen2: generate() hands over its mask by layer type there."""
    model, batch = make_model(decoder), make_batch(PADDED)
    same(pruned(model, batch, PACKS, cache_implementation="static"), pruned(model, batch, PACKS))


@pytest.mark.parametrize("policy", [SAVES_KEYS, PACKS, vlmprune.FastV(layer=2, keep=3, earlier_kv="compact")])
def test_second_turn_in_a_static_cache(model, policy):
    """The second prompt has padding, an image of its own, and finds entries of both kinds."""
    first, second = make_batch([["I", 9], [3, "I", 5]]), make_batch([[5, "I", 4], [2]], seed=1)
    results = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=96)):
        with vlmprune.prune(model, policy):
            tokens, *_ = generate(model, first, 4, past_key_values=cache)
            ids = torch.cat([first["input_ids"], tokens, second["input_ids"]], 1)
            ones = torch.ones_like(tokens)
            mask = torch.cat([first["attention_mask"], ones, second["attention_mask"]], 1)
            batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
            results.append(generate(model, batch, 4, past_key_values=cache))
    same(results[1], results[0])


def test_a_reset_static_cache_serves_plain_and_pruned_calls(model):
    batch, cache = make_batch(ONE), StaticCache(config=model.config, max_cache_len=40)
    want = {True: pruned(model, batch, SAVES_KEYS), False: generate(model, batch, 5)}
    for prune in (True, False, True):
        call = (model, batch, SAVES_KEYS) if prune else (model, batch)
        steps = {} if prune else {"steps": 5}
        same((pruned if prune else generate)(*call, **steps, past_key_values=cache), want[prune])
        cache.reset()


@pytest.mark.parametrize("specs", [ONE, PADDED], ids=["one", "padded"])
def test_compiled_decode_is_one_graph(specs):
    """Plain and pruned calls in any order; another scope and another number of tokens reuse the graph."""
    torch._dynamo.reset()
    counters.clear()
    model, batch = make_model(num_hidden_layers=2), make_batch(specs)
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None, dynamic=False)
    compiled._compile_all_devices = True
    policies = {None: 1, vlmprune.FastV(layer=1, keep=0.5): 1, vlmprune.FastV(layer=1, keep=3): 0}
    for again in (False, True):
        for policy, graphs in policies.items():
            run = generate if policy is None else pruned
            call = (model, batch, 4) if policy is None else (model, batch, policy, 4)
            want, before = run(*call), counters["stats"]["unique_graphs"]
            same(run(*call, cache_implementation="static", compile_config=compiled), want)
            assert counters["stats"]["unique_graphs"] - before == (0 if again else graphs)
            assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


COMPILED = {
    "inside": vlmprune.FastV(layer=1, keep=5, earlier_kv="compact"),
    "tower": vlmprune.FasterVLM(keep=5, positions="pack"),
}


@pytest.mark.parametrize("policy", COMPILED.values(), ids=COMPILED)
def test_compiled_prefill(policy):
    """Graph breaks are allowed there; the results are the same, also with one layer of a tower read that is not its first."""
    torch._dynamo.reset()
    model, batch = make_model(num_hidden_layers=2), make_batch(ONE)
    want = pruned(model, batch, policy, 2)
    model.forward = torch.compile(model.forward, backend="eager")
    same(pruned(model, batch, policy, 2), want)


# Offloaded, quantized, none


@pytest.fixture
def streams(monkeypatch):
    without_streams(monkeypatch)


@pytest.mark.parametrize("policy", [SAVES_KEYS, PACKS, vlmprune.FastV(layer=2, keep=3, earlier_kv="compact")])
def test_offloaded_cache(model, policy, streams):
    batch = make_batch(PADDED)
    want = pruned(model, batch, policy)
    same(pruned(model, batch, policy, cache_implementation="offloaded"), want)
    cache = StaticCache(config=model.config, max_cache_len=64, offloading=True)
    same(pruned(model, batch, policy, past_key_values=cache), want)


def test_no_cache(model):
    batch = make_batch(PADDED)
    want = pruned(model, batch, SAVES_KEYS, 1)
    same(pruned(model, batch, SAVES_KEYS, 1, use_cache=False), want)


@pytest.fixture
def rounded(monkeypatch, model):
    return rounded_cache(monkeypatch, model.config, LAYERS)


@pytest.mark.parametrize("policy", [SAVES_KEYS, PACKS])
def test_quantized_cache(model, policy, rounded):
    batch = make_batch(PADDED)
    got, want = pruned(model, batch, policy, past_key_values=rounded), pruned(model, batch, policy)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0.02)
    ids = torch.cat([batch["input_ids"], got[0], torch.full((3, 2), 7)], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 7, dtype=torch.long)], 1)
    with vlmprune.prune(model, policy):  # a text-only second turn over quantized, pruned entries
        turns = [
            generate(model, {"input_ids": ids, "attention_mask": mask}, 3, past_key_values=cache)
            for cache in (rounded, want[2].past_key_values)
        ]
    torch.testing.assert_close(turns[0][1], turns[1][1], rtol=0, atol=0.05)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="transformers has no Fp8 cache yet"
)
def test_fp8_cache(model):
    """Eight bits are too few for equality; what is kept and what is seen stays the same."""
    batch = make_batch(PADDED)
    cache = QuantizedCache(backend="fp8", config=model.config)
    got, want = (
        pruned(model, batch, SAVES_KEYS, 3, past_key_values=cache),
        pruned(model, batch, SAVES_KEYS, 3),
    )
    for one, other in zip(got[3].stages, want[3].stages, strict=True):
        assert torch.equal(one.index, other.index)
    torch.testing.assert_close(
        got[1][:, 0], want[1][:, 0], **ATOL
    )  # prefill attends to what is not yet rounded
    lengths = [[layer.get_seq_length() for layer in out.past_key_values.layers] for out in (got[2], want[2])]
    assert lengths[0] == lengths[1]
    assert cache.layers[3]._quantized_keys[0].shape == want[2].past_key_values.layers[3].keys.shape


def test_quantized_cache_cannot_be_compacted(model, rounded):
    policy = vlmprune.FastV(layer=2, earlier_kv="compact")
    with pytest.raises(ModelError, match=r"^earlier_kv: expected 'full' with a quantized cache"):
        pruned(model, make_batch(ONE), policy, past_key_values=rounded)


def test_a_cache_is_compacted_whole_or_not_at_all(model, rounded):
    """The layer that can be compacted comes first, and still holds what it held."""
    rounded.layers[0] = DynamicLayer()
    with pytest.raises(ModelError, match=r"^earlier_kv: expected 'full' with a quantized cache"):
        pruned(model, make_batch(ONE), vlmprune.FastV(layer=2, earlier_kv="compact"), past_key_values=rounded)
    assert type(rounded.layers[0]) is DynamicLayer and rounded.layers[0].get_seq_length() == 28


def test_an_unknown_kind_is_refused_before_anything_runs(model):
    class Strange(type(DynamicCache(config=model.config).layers[0])):
        pass

    cache = DynamicCache(config=model.config)
    cache.layers = [Strange() for _ in range(LAYERS)]
    with pytest.raises(ModelError, match=r"^cache: expected layers of DynamicLayer, .* got Strange$"):
        pruned(model, make_batch(ONE), SAVES_KEYS, past_key_values=cache)
    assert not cache.layers[0].is_initialized
