"""Compacting the KV cache of earlier layers: how many calls it takes, and what becomes of the memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import vlmprune
from helpers.tiny import IMAGE, make_batch, make_model
from vlmprune.models.host.cache_view import resident_bytes

ONE = [[4, "I", 7]]
PADDED = [["I", 9, "I", 4], [3, "I", 5], [12]]
FASTV = vlmprune.FastV(layer=2, keep=3, earlier_kv="compact")


class Compactions(TorchDispatchMode):
    """Calls that move keys and values (rank 4): the op, how many tensors, where they were."""

    def __init__(self):
        super().__init__()
        self.calls, self.old = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name in ("vlmprune.gather_tokens.default", "vlmprune.compact_kv.default") and args[0][0].ndim == 4:
            self.calls.append((name.split(".")[1], len(args[0])))
            self.old += [(StorageWeakRef(x.untyped_storage()), x.data_ptr()) for x in args[0]]
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return make_model()


def kv(cache):
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def made(model, static=False, room=96):
    return StaticCache(config=model.config, max_cache_len=room) if static else DynamicCache()


@torch.no_grad()
def prefill(model, policy, specs, cache):
    """The calls it took, and what they moved."""
    with vlmprune.prune(model, policy), Compactions() as seen:
        model(**make_batch(specs), past_key_values=cache)
    return seen


@pytest.mark.parametrize("specs", [ONE, PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_layers_that_forget_the_same_do_so_in_one_call(model, static, specs):
    op = "compact_kv" if static else "gather_tokens"
    assert prefill(model, FASTV, specs, made(model, static)).calls == [(op, 4)]
    two = vlmprune.Feather(layers=(2, 5), keep=0.5, earlier_kv="compact")  # layers 0, 1 and 2, 3, 4
    assert prefill(model, two, specs, made(model, static)).calls == [(op, 4), (op, 6)]
    none = vlmprune.FastV(layer=2, keep=3)
    assert prefill(model, none, specs, made(model, static)).calls == []


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_twenty_layers_are_still_one_call(static):
    model, op = make_model(num_hidden_layers=22), "compact_kv" if static else "gather_tokens"
    deep = vlmprune.FastV(layer=20, keep=3, earlier_kv="compact")
    assert prefill(model, deep, ONE, made(model, static)).calls == [(op, 40)]


@torch.no_grad()
def test_a_second_turn_after_a_change_of_the_cache_is_still_one_call(model):
    """Reordering gives every layer a validity of its own."""
    cache, first, more = DynamicCache(), make_batch(PADDED), make_batch(PADDED, seed=1)
    more["attention_mask"] = torch.cat([first["attention_mask"], more["attention_mask"]], 1)
    with vlmprune.prune(model, FASTV), Compactions() as seen:
        model(**first, past_key_values=cache)
        cache.reorder_cache(torch.tensor([0, 1, 2]))
        model(**more, past_key_values=cache)
    assert seen.calls == [("gather_tokens", 4)] * 2


@pytest.mark.parametrize("specs", [ONE, PADDED], ids=["one", "padded"])
def test_a_growing_cache_frees_the_longer_tensors(model, specs):
    cache, whole = DynamicCache(), DynamicCache()
    seen = prefill(model, vlmprune.Random(layer=4, keep=0.25, earlier_kv="compact"), specs, cache)
    prefill(model, vlmprune.Random(layer=4, keep=0.25), specs, whole)
    assert len(seen.old) == 8 and all(storage.expired() for storage, _ in seen.old)
    width, short = (x.layers[0].keys.shape[2] for x in (whole, cache))
    assert resident_bytes(whole) - resident_bytes(cache) == 8 * len(specs) * 4 * 8 * 4 * (width - short) > 0
    assert resident_bytes(cache) == sum(x.untyped_storage().nbytes() for x in kv(cache))


@torch.no_grad()
@pytest.mark.parametrize("specs", [ONE, PADDED], ids=["one", "padded"])
def test_a_static_cache_writes_on_behind_what_it_kept(model, specs):
    cache, batch = made(model, static=True), make_batch(specs)
    prompt = batch["input_ids"].shape[1]
    with vlmprune.prune(model, FASTV), Compactions() as seen:
        model(**batch, past_key_values=cache)
        assert [at for _, at in seen.old] == [x.data_ptr() for x in kv(cache)[:4]]  # moved in place
        (n,) = {int(layer.cumulative_length) for layer in cache.layers}
        images = batch["input_ids"].eq(IMAGE).sum(1) // 16  # three tokens of each stay
        kept = (batch["attention_mask"].sum(1) - 13 * images).tolist()
        assert n == max(kept) < prompt and cache.layers[0].dropped == prompt - n
        first = cache.layers[0]
        if first.valid is not None:  # shorter samples have padding behind their last entry
            assert first.valid[:, :n].sum(1).tolist() == kept
            assert all(bool(row[:k].all()) for row, k in zip(first.valid, kept, strict=True))
        before = [x.clone() for x in kv(cache)]
        step(model, cache, batch)
    for old, new in zip(before, kv(cache), strict=True):
        assert torch.equal(old[:, :, :n], new[:, :, :n]) and torch.equal(
            old[:, :, n + 1 :], new[:, :, n + 1 :]
        )
        assert not torch.equal(old[:, :, n], new[:, :, n])
    assert {int(layer.cumulative_length) for layer in cache.layers} == {n + 1}


def step(model, cache, batch):
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    token, place = torch.full((len(mask), 1), 5), mask.sum(1)[:, None] - 1
    return model(token, attention_mask=mask, position_ids=place, past_key_values=cache).logits


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode], ids=["gradients", "inference"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_with_gradients_and_in_inference_mode(model, static, mode):
    """A prefill outside of ``no_grad`` leaves keys and values with a graph."""
    batch, logits = make_batch(PADDED), []
    for how in (mode, torch.no_grad):
        cache = made(model, static)
        with how(), vlmprune.prune(model, FASTV):
            model(**batch, past_key_values=cache)
        with torch.inference_mode() if mode is torch.inference_mode else torch.no_grad():
            with vlmprune.prune(model, FASTV):
                logits.append(step(model, cache, batch))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
