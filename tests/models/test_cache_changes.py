"""What users do to a pruned KV cache - copy, pickle, reorder, repeat, select, crop - does to it what it should."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vlmprune
from helpers.tiny import generate, make_batch, make_model

PADDED = [["I", 9, "I", 4], [3, "I", 5], [12]]
SAVES_KEYS = vlmprune.FastV(layer=2, keep=0.5)  # scores from the cache
PACKS = vlmprune.PyramidDrop(
    layers=(1, 3), positions="pack"
)  # scores ahead of it, two stages, packed positions
ATOL = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def model():
    return make_model()


def same(got, want):
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], **ATOL)


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("policy", [SAVES_KEYS, PACKS])
def test_copies_go_on_alike(model, clone, static, policy):
    batch = make_batch(PADDED)
    cache = (
        StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    )
    with vlmprune.prune(model, policy):
        got = generate(model, batch, 2, past_key_values=cache)
        want = generate(model, batch, 5)
    other = clone(cache)
    ids = torch.cat([batch["input_ids"], got[0]], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(got[0])], 1)
    with vlmprune.prune(model, policy):
        turns = [
            generate(model, {"input_ids": ids, "attention_mask": mask}, 3, past_key_values=c)
            for c in (other, cache)
        ]
    same(turns[0], turns[1])
    same([t[:, 2:] for t in want[:2]], turns[0])


@torch.no_grad()
def step(model, cache, tokens, mask, positions):
    out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return out.logits[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("policy", [SAVES_KEYS, PACKS])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_cropped_reordered_repeated_selected(model, policy, static):
    """Each change of the cache gives what the same change of the batch gives."""
    batch = make_batch(PADDED)
    more = torch.tensor([[11, 12], [13, 14], [15, 16]])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
    places = mask.cumsum(1)[:, -2:] - 1
    with vlmprune.prune(model, policy):
        cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache()
        model(**batch, past_key_values=cache)
        first = step(model, cache, more[:, :1], mask[:, :-1], places[:, :1])
        order = torch.tensor([2, 0, 1])
        if static:  # transformers reorders static layers, nothing else
            cache.reorder_cache(order)
            reordered = copy.deepcopy(cache)
            cache.reorder_cache(order.argsort())
            want = step(model, cache, more[:, 1:], mask, places[:, 1:])
            got = step(model, reordered, more[order, 1:], mask[order], places[order, 1:])
            torch.testing.assert_close(got, want[order], **ATOL)
            return
        changed = {name: copy.deepcopy(cache) for name in ("reorder", "repeat", "select", "crop")}
        want = step(model, cache, more[:, 1:], mask, places[:, 1:])
        changed["reorder"].reorder_cache(order)
        changed["repeat"].batch_repeat_interleave(2)
        changed["select"].batch_select_indices(torch.tensor([0, 2]))
        changed["crop"].crop(-1)
        rows = {
            "reorder": order,
            "repeat": torch.arange(3).repeat_interleave(2),
            "select": torch.tensor([0, 2]),
        }
        for name, at in rows.items():
            got = step(model, changed[name], more[at, 1:], mask[at], places[at, 1:])
            torch.testing.assert_close(got, want[at], **ATOL)
        again = step(model, changed["crop"], more[:, :1], mask[:, :-1], places[:, :1])
        torch.testing.assert_close(again, first, **ATOL)
