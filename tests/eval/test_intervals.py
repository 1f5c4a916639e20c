"""Intervals: Wilson's against published values and its own equation, the bootstrap against drawing by hand."""

import numpy as np
import pytest

from vlmprune.eval.intervals import Z, bootstrap, proportion


def test_wilson_by_its_equation():
    """Its ends are where the observed share is Z standard errors away: (p - e)^2 = Z^2 e (1 - e) / n."""
    p, low, high = proportion([1.0] * 7 + [0.0] * 13)
    assert p == 0.35
    for end in (low, high):
        assert (p - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / 20)


def test_wilson_at_the_ends():
    assert proportion([1.0] * 10) == (1.0, pytest.approx(10 / (10 + Z**2)), 1.0)
    assert proportion([0.0] * 10) == (0.0, 0.0, pytest.approx(Z**2 / (10 + Z**2)))


def test_bootstrap_like_drawing_questions():
    values = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=60, p=[0.3, 0.6, 0.1])
    drawn = np.random.default_rng(2).choice(values, size=(20_000, 60)).mean(1)
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    assert bootstrap(values) == (mean, low, high)  # fixed seed


def test_bootstrap_of_no_difference():
    assert bootstrap([0.0] * 5) == (0.0, 0.0, 0.0)


def test_shares_of_several_draws_are_not_wilson():
    assert proportion([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_nothing_to_estimate():
    for estimate in (proportion, bootstrap):
        with pytest.raises(ValueError, match=r"^values: expected at least one, got none$"):
            estimate([])
