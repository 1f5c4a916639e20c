"""A decode step of one sample runs exactly the tensor operations of an unpruned one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import vlmprune
from helpers.tiny import make_batch, make_model


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def decode_ops(model, specs, policy):
    """Operations of the second decode step."""
    batch, cache = make_batch(specs), DynamicCache()
    mask, token = batch["attention_mask"], torch.full((len(specs), 1), 5)
    with nullcontext() if policy is None else vlmprune.prune(model, policy):
        model(**batch, past_key_values=cache)
        for _ in range(2):
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            with Ops() as ops:
                model(
                    token, attention_mask=mask, position_ids=mask.sum(1)[:, None] - 1, past_key_values=cache
                )
    return ops.names


TWO = vlmprune.Stages([vlmprune.Random(layer=1, keep=10), vlmprune.FastV(layer=3, keep=4)])


@pytest.mark.parametrize("policy", [vlmprune.FastV(layer=2, keep=0.5), TWO], ids=["one-stage", "two-stages"])
def test_one_sample_costs_nothing(policy):
    model = make_model()
    assert decode_ops(model, [[4, "I", 7]], policy) == decode_ops(model, [[4, "I", 7]], None)


def test_eager_attention_saves_the_mask():
    model = make_model(attn="eager")
    plain, ops = (decode_ops(model, [[4, "I", 7]], p) for p in (None, vlmprune.FastV(layer=2)))
    assert (
        plain.count("aten.add.Tensor") - ops.count("aten.add.Tensor") == len(plain) - len(ops) == 4
    )  # layers 2..5


def test_a_compacted_cache_costs_three_operations_a_step():
    """transformers cuts its own 2-D mask to what layer 0 holds: once a step, whatever the depth."""
    model, policy = make_model(), vlmprune.FastV(layer=2, earlier_kv="compact")
    plain, ops = (decode_ops(model, [[4, "I", 7]], p) for p in (None, policy))
    more = [name for name in set(ops) for _ in range(ops.count(name) - plain.count(name))]
    assert sorted(more) == ["aten.add.Tensor", "aten.arange.default", "aten.index.Tensor"]


def test_layers_of_a_stage_share_what_a_padded_batch_costs():
    """One mask for each stage and step, not for each layer."""
    model, specs = make_model(), [["I", 9, "I", 4], [3, "I", 5]]
    plain = decode_ops(model, specs, None)
    early, late = (decode_ops(model, specs, vlmprune.Random(layer=layer)) for layer in (1, 4))
    assert len(early) == len(late) > len(plain)


def test_compacted_layers_of_a_padded_batch_share_a_mask():
    model, specs = make_model(), [["I", 9, "I", 4], [3, "I", 5]]
    early, late = (
        decode_ops(model, specs, vlmprune.Random(layer=layer, earlier_kv="compact")) for layer in (1, 4)
    )
    assert len(early) == len(late)
