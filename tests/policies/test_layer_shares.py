"""Shares by layer: what a schedule leaves, P-Sigmoid's curve and budget, and G-Search against trying everything."""

import math
from itertools import combinations_with_replacement, pairwise

import pytest

from vlmprune.errors import InputError
from vlmprune.policies import DART, VTW, FastV, Feather, KNorm, Stages, g_search, p_sigmoid, scheduled
from vlmprune.policies.schedule import stage_counts

LEVELS = 8


@pytest.mark.parametrize("policy", [FastV(rows="mean"), DART(count="exact"), KNorm(spend="image")], ids=repr)
def test_a_schedule_leaves_its_shares_of_the_unpruned_tokens(policy):
    shares = (0.9, 0.9, 0.41, 0.4, 0.02)
    made = scheduled(policy, [2, 3, 5, 8, 9], shares)
    assert made.layers == (2, 5, 8, 9)  # at layer 3 nothing goes
    for (_, tokens), share in zip(stage_counts(made, 576), (0.9, 0.41, 0.4, 0.02), strict=True):
        assert share * 576 - 4 < tokens <= share * 576 + 1e-6
    assert all(type(stage) is type(policy) for stage in made.policies)
    assert {getattr(stage, "rows", None) for stage in made.policies} == {getattr(policy, "rows", None)}


def test_settings_of_every_policy_are_those_of_the_whole():
    made = scheduled(FastV(earlier_kv="compact", rectify=True), (2, 4), (0.5, 0.25))
    assert made == Stages([FastV(2, 0.5), FastV(4, 0.5)], earlier_kv="compact", rectify=True)
    assert scheduled(FastV(), (3, 4), (1.0, 1.0)) == Stages([FastV(3, 1.0)])


@pytest.mark.parametrize("mean", [0.05, 0.3, 0.75, 0.999])
@pytest.mark.parametrize("steepness", [0, 0.1, 1.5, 40.0, 1e6])
@pytest.mark.parametrize("layers, first", [(32, 0), (32, 1), (1, 0)])
def test_the_curve_meets_its_mean(layers, first, steepness, mean):
    shares = p_sigmoid(layers, steepness, mean, first=first)
    assert len(shares) == layers - first and all(0 < share <= 1 for share in shares)
    assert (first + sum(shares)) / layers == pytest.approx(mean, abs=1e-9)
    assert list(shares) == sorted(shares, reverse=True)


def test_the_curve_is_a_sigmoid_of_the_layer():
    """Its logits fall by the steepness from each layer to the next."""
    shares = p_sigmoid(12, 0.7, 0.4, first=3)
    logits = [math.log(share / (1 - share)) for share in shares]
    assert [a - b for a, b in pairwise(logits)] == pytest.approx([0.7] * 8)


def test_the_limits_of_the_curve():
    assert p_sigmoid(10, 0, 0.25) == pytest.approx([0.25] * 10)
    steep = p_sigmoid(10, 500.0, 0.5)
    assert steep[:5] == pytest.approx([1.0] * 5) and max(steep[5:]) < 1e-9
    assert p_sigmoid(4, 3.0, 1.0, first=1) == (1.0,) * 3
    made = scheduled(FastV(), range(2, 32), p_sigmoid(32, 30.0, 0.2, first=2))  # tiny shares are shares
    assert stage_counts(made, 576)[-1][1] == 1


def sharp(least):
    """A score that is 1 where at least ``least[layer]`` tokens of 80 are left at each layer, and else falls short."""

    def score(policy):
        entering, stages = 80, dict(stage_counts(policy, 80))
        good = 0
        for layer in range(2, 6):
            entering = stages.get(layer, entering)
            good += entering >= least[layer]
        return good / 4

    return score


@pytest.mark.parametrize(
    "least", [(80, 41, 10, 1), (30, 30, 30, 30), (1, 1, 1, 1), (80, 80, 80, 80), (55, 20, 20, 3)], ids=str
)
def test_the_search_finds_the_least_at_every_layer(least):
    """Of all schedules that fall and keep the score, tried one by one, the one with the fewest tokens."""
    layers, score = range(2, 6), sharp(dict(zip(range(2, 6), least, strict=True)))
    got = g_search(score, FastV(), layers, 0.0, levels=LEVELS)

    def tokens(shares):
        return [round(80 * share) for share in shares]

    every = combinations_with_replacement(range(LEVELS, 0, -1), 4)
    good = [s for s in every if all(n * 80 // LEVELS >= need for n, need in zip(s, least, strict=True))]
    assert tokens(got) == tokens(n / LEVELS for n in min(good, key=sum))
    assert score(scheduled(FastV(), layers, got)) == 1


def test_the_tolerance_is_of_the_whole():
    score = sharp({2: 80, 3: 80, 4: 10, 5: 10})
    assert g_search(score, FastV(), range(2, 6), 0.25, levels=LEVELS)[:2] == (1.0, 0.125)


def test_what_the_search_costs():
    """One score of the whole, and log2(levels) for each layer."""
    calls = []
    g_search(lambda policy: calls.append(policy) or 1.0, FastV(), (2, 4, 6), 0.1, levels=32)
    assert len(calls) == 1 + 5 and calls[0] == Stages(
        [FastV(2, 1.0)]
    )  # after the first layer one level is left
    calls.clear()
    g_search(lambda policy: calls.append(policy) or float(len(calls) == 1), FastV(), (2, 4), 0.1, levels=32)
    assert len(calls) == 1 + 5 + 5


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: scheduled(Feather(), (2,), (0.5,)),
            r"^policy: expected a policy with settings 'layer' and 'keep'",
        ),
        (
            lambda: scheduled(VTW(), (2,), (0.5,)),
            r"^policy: expected a policy with settings 'layer' and 'keep'",
        ),
        (
            lambda: scheduled("fastv", (2,), (0.5,)),
            r"^policy: expected a policy with settings .*, got 'fastv'$",
        ),
        (lambda: scheduled(FastV(), (4, 2), (0.5, 0.5)), r"^layers: expected one or more layers, ascending"),
        (lambda: scheduled(FastV(), (2, 4), (0.5, 0.6)), r"^shares: expected 2 shares that do not rise"),
        (lambda: scheduled(FastV(), (2, 4), (0.5,)), r"^shares: expected 2 shares that do not rise"),
        (lambda: scheduled(FastV(), (2,), (0.0,)), r"^shares: expected a share in \(0, 1\] as a float"),
        (lambda: p_sigmoid(0, 1.0, 0.5), r"^layers: expected a whole number >= 1, got 0$"),
        (lambda: p_sigmoid(8, -1.0, 0.5), r"^steepness: expected a number from 0 to 1e6, got -1.0$"),
        (lambda: p_sigmoid(8, 1e300, 0.5), r"^steepness: expected a number from 0 to 1e6, got 1e\+300$"),
        (lambda: p_sigmoid(8, math.nan, 0.5), r"^steepness: expected a number from 0 to 1e6, got nan$"),
        (lambda: p_sigmoid(8, 1.0, 1.5), r"^mean: expected a share in \(0, 1\]"),
        (lambda: p_sigmoid(8, 1.0, 0.5, first=8), r"^first: expected a layer below 8, got 8$"),
        (
            lambda: p_sigmoid(8, 1.0, 0.25, first=2),
            r"^mean: expected more than the 2 full layers of 8 alone, got",
        ),
        (lambda: g_search(len, Feather(), (2,), 0.0), r"^policy: expected a policy with settings"),
        (lambda: g_search(len, FastV(), (), 0.0), r"^layers: expected one or more layers"),
        (
            lambda: g_search(lambda policy: math.nan, FastV(), (2,), 0.0),
            r"^score: expected a number, got nan$",
        ),
        (lambda: g_search(len, FastV(), (2,), -0.1), r"^tolerance: expected a number >= 0, got -0.1$"),
        (
            lambda: g_search(len, FastV(), (2,), 0.1, levels=0),
            r"^levels: expected a whole number >= 1, got 0$",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
