"""Schedules of a search: they meet the budget, keep no less than they may, and have the shape they are named for."""

import pytest

from vlmprune.eval.arms import PromptSize, cost
from vlmprune.flops import DecoderShape
from vlmprune.policies import FastV, g_search, p_sigmoid, scheduled
from vlmprune.policies.schedule import stage_counts
from vlmprune.tuning.schedules import GSearch, PSigmoid

PROMPT = PromptSize(
    DecoderShape(layers=8, hidden=64, heads=4, kv_heads=4, head_dim=16, intermediate=96), 196, 12
)


def cut(policy):
    return cost(PROMPT, stage_counts(policy, PROMPT.visual))[0]


def never(policy):
    raise AssertionError("scored")


@pytest.mark.parametrize("steepness", [0, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8])
def test_a_curve_meets_the_budget(steepness, budget):
    made = PSigmoid(FastV(layer=1), steepness).fit(budget, PROMPT, never)
    assert budget <= cut(made) < budget + 0.01
    # somewhere between two means of the same curve
    layers = range(1, 8)
    counts = dict(stage_counts(made, 196))
    for mean, sign in ((0.13, 1), (0.99, -1)):
        other = dict(stage_counts(scheduled(FastV(), layers, p_sigmoid(8, steepness, mean, first=1)), 196))
        assert all(sign * (counts[layer] - n) >= 0 for layer, n in other.items() if layer in counts)


def test_g_search_keeps_its_shape():
    """A score that needs 98 tokens up to layer 3, and 49 behind it: twice as many of the first at every budget."""

    def score(policy):
        left = stage_counts(policy, 196)
        return float(all(n >= (98 if layer < 4 else 49) for layer, n in left))

    assert g_search(score, FastV(), range(1, 8), 0.02, levels=8) == (0.5,) * 3 + (0.25,) * 4
    for budget in (0.5, 0.7):
        made = GSearch(FastV(layer=1)).fit(budget, PROMPT, score)
        assert budget <= cut(made) < budget + 0.01
        (first, second) = stage_counts(made, 196)
        assert first[0] == 1 and second[0] == 4 and second[1] == pytest.approx(first[1] / 2, abs=1)
    # so little is to be saved that the first layers keep everything
    lenient = dict(stage_counts(GSearch(FastV(layer=1)).fit(0.05, PROMPT, score), 196))
    assert set(lenient) == {4} and lenient[4] > 98


@pytest.mark.parametrize("schedule", [PSigmoid(FastV(layer=4)), GSearch(FastV(layer=4))])
def test_a_budget_that_layers_before_it_spend(schedule):
    with pytest.raises(ValueError, match=r"^budget: expected a cut of at most 0\.4\d+, got 0.6$"):
        schedule.check_budget(0.6, PROMPT)
    with pytest.raises(ValueError, match=r"^budget: expected a cut of at most 0\.4\d+, got 0.6$"):
        schedule.fit(0.6, PROMPT, never)
