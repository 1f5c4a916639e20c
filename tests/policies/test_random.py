"""The random baseline: seeded, fair, independent of the device and of the other samples."""

import math

import pytest
import torch

from helpers.contexts import case, kept_lists
from vlmprune.policies import Random


def test_seeds_and_samples_differ():
    ctx = case(["square", "square"]).ctx
    one, other = (Random(seed=seed).select(ctx) for seed in (0, 1))
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


def test_does_not_depend_on_the_other_samples():
    alone = kept_lists(Random(keep=6).select(case(["tall", "square"]).ctx))
    among = kept_lists(Random(keep=6).select(case(["two", "square", "none"]).ctx))
    assert alone[1] == among[1]


def test_does_not_touch_the_global_generator():
    ctx = case(["square"]).ctx
    state = torch.get_rng_state()
    Random(seed=3).select(ctx)
    assert torch.equal(state, torch.get_rng_state())


def test_every_token_is_equally_likely():
    """400 seeds, half of 36 tokens: each count is within five standard deviations of 200."""
    ctx = case(["square"]).ctx
    hits = torch.zeros(36)
    for seed in range(400):
        hits[Random(keep=0.5, seed=seed).select(ctx)[0]] += 1
    assert (hits - 200).abs().max() < 5 * math.sqrt(400 * 0.25)


@pytest.mark.parametrize("seed", [-1, 1.0, True, 2**63])
def test_rejects_seeds(seed):
    with pytest.raises(ValueError, match=r"^seed: expected a whole number in \[0, 2\*\*63\), got"):
        Random(seed=seed)


def test_allows_the_first_layer():
    assert Random(layer=0).layers == (0,)
    with pytest.raises(ValueError, match=r"^layer: expected a whole number >= 0, got -1$"):
        Random(layer=-1)
