"""Random pruning at a deep layer, alone and after an early method."""

import torch

from helpers.contexts import case
from vlmprune.policies import FastV, Random, Stages
from vlmprune.policies.methods.random_deep import RandomDeep
from vlmprune.policies.schedule import stage_counts


def test_is_random_at_a_deep_layer():
    ctx = case(["two", "none", "tall"], layer=20).ctx
    assert RandomDeep().layers == (20,)
    for settings in ({}, {"keep": 3, "seed": 5}):
        assert torch.equal(RandomDeep(**settings).select(ctx), Random(layer=20, **settings).select(ctx))
    assert RandomDeep() != Random(layer=20) and isinstance(RandomDeep(), Random)


def test_recipe():
    both = Stages([FastV(keep=0.5), RandomDeep(keep=0.25)])
    assert stage_counts(both, 576) == [(2, 288), (20, 72)]
