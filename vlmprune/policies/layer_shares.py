"""Schedules over layers for any scorer: how many tokens stay at each, given as a curve (P-Sigmoid) or searched (G-Search).

Both are from "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction" (CVPR 2025), arXiv
2412.00556v2. Its observation: the ranking of visual tokens by attention is much the same at every layer but the first, so
that the tokens which matter become fewer with depth, and never others. No code is released, and of the paper only abstract
and reviews could be read: what that leaves open is said below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from vlmprune.errors import check
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.checks import check_keep, check_layers, check_number, check_whole, is_number, plain
from vlmprune.policies.compose import Stages

HALVINGS = 60


def scheduled(policy: PruningPolicy, layers: Sequence[int], shares: Sequence[float]) -> Stages:
    """A policy of one stage run at many layers, with ``shares`` of the UNPRUNED visual tokens left at each.

    Layers at which nothing goes are left out. Each stage keeps its share of what the one before has left, rounded down, so
    that ``shares`` are met within one token a stage.

    Args:
        policy: with settings ``layer`` and ``keep``, for example ``FastV()``: in the paper tokens are ranked by the
            attention of the layer before.
        layers: ascending.
        shares: in (0, 1], not rising, one a layer.

    Returns:
        ``Stages`` with the ``earlier_kv`` and ``rectify`` of the policy.

    Raises:
        InputError: a policy without these settings, layers that do not ascend, or shares that are not as above.

    Example:
        >>> from vlmprune import FastV
        >>> [(p.layer, p.keep) for p in scheduled(FastV(), (2, 4, 8), (0.5, 0.5, 0.25)).policies]
        [(2, 0.5), (8, 0.5)]
    """
    _check_single(policy)
    layers, shares = plain(tuple(layers)), plain(tuple(shares))
    check_layers(layers, 0)
    for share in shares:
        check_keep(share, "shares", counts=False)
    falls = len(shares) == len(layers) and all(a >= b for a, b in pairwise(shares))
    check(falls, "shares", f"{len(layers)} shares that do not rise, one a layer", repr(shares))
    shared = {"earlier_kv": policy.earlier_kv, "rectify": policy.rectify}
    alone = replace(policy, earlier_kv="full", rectify=False)
    kept = zip(layers, (1.0, *shares), shares, strict=False)
    stages = [replace(alone, layer=i, keep=now / before) for i, before, now in kept if now < before]  # type: ignore[call-arg]
    first = replace(alone, layer=layers[0], keep=1.0)  # type: ignore[call-arg]
    return Stages(stages or [first], **shared)  # type: ignore[arg-type]


def p_sigmoid(layers: int, steepness: float, mean: float, *, first: int = 0) -> tuple[float, ...]:
    """P-Sigmoid: shares 1 / (1 + exp(k (i - a))) of the visual tokens left at layers i, whose mean over all layers is a budget.

    A reading. Published is a sigmoid of the layer with a midpoint a and a parameter k that Bayesian optimisation searches
    under a budget, the mean share. Here the budget fixes the midpoint, by bisection, and k is what is left to search: of
    every k the schedule costs the same. How k is scaled in the paper, and whether a is searched too, is not known.

    Args:
        layers: decoder layers.
        steepness: k per layer, 0 to a million: 0 is the same share everywhere, a large one a step from all to almost none.
        mean: the mean of the shares over all ``layers`` inputs, in (0, 1].
        first: layers before this one see everything, which counts for the mean.

    Returns:
        A share for each of the layers ``first ... layers - 1``, falling, each in (0, 1]; the last of them are tiny where k is large.

    Raises:
        InputError: a number is out of range, or ``first`` layers alone are more than the mean.

    Example:
        >>> [round(share, 2) for share in p_sigmoid(8, 1.5, 0.5)]
        [0.99, 0.98, 0.9, 0.68, 0.32, 0.1, 0.02, 0.01]
        >>> p_sigmoid(3, 0, 0.5)
        (0.5, 0.5, 0.5)
    """
    check_whole("layers", layers, 1)
    check_whole("first", first, 0)
    fits = is_number(steepness) and 0 <= steepness <= 1e6
    check(fits, "steepness", "a number from 0 to 1e6", repr(steepness))
    check_keep(mean, "mean", counts=False)
    behind = layers - first
    check(behind > 0, "first", f"a layer below {layers}", first)
    wanted = mean * layers - first
    check(wanted > 0, "mean", f"more than the {first} full layers of {layers} alone", mean)
    if wanted >= behind:
        return (1.0,) * behind
    middle = (behind - 1) / 2

    def shares(offset: float) -> tuple[float, ...]:
        return tuple(_sigmoid(offset - steepness * (i - middle)) for i in range(behind))

    bound = 750.0 + steepness * behind  # where every share is 0, or 1
    low, high = -bound, bound
    for _ in range(HALVINGS):
        between = (low + high) / 2
        low, high = (between, high) if sum(shares(between)) <= wanted else (low, between)
    return tuple(max(share, math.ulp(0.0)) for share in shares(low))


def g_search(
    score: Callable[[PruningPolicy], float],
    policy: PruningPolicy,
    layers: Sequence[int],
    tolerance: float,
    *,
    levels: int = 32,
) -> tuple[float, ...]:
    """G-Search: from the shallow layers to the deep, the least share of tokens at each that keeps the score.

    While a layer's share is searched, all behind it keep as many (what is gone does not come back), all before it what was
    found for them. If the tokens that matter never become more with depth, that finds the least at every layer.

    A reading. The paper searches each layer's rate by Bayesian optimisation of an objective that weighs score against cost,
    which is not known; here it is bisected, which takes the score to rise with the share. It takes the same pruned score to
    be good enough: what the run that drops nothing has, less ``tolerance``.

    Args:
        score: of a policy, the higher the better: an accuracy on some questions that are not those of the evaluation, or the
            negative divergence from the unpruned answers. It must give the same for the same policy.
        policy: as for ``scheduled``.
        layers: ascending; the paper's observation does not hold of the first layer's attention, so begin at 2 with FastV.
        tolerance: how much of the score may be lost in all, >= 0.
        levels: shares are multiples of 1 / levels, of which each layer tries about log2(levels).

    Returns:
        A share for each layer, not rising: ``scheduled(policy, layers, shares)`` is what scored at least that.

    Raises:
        InputError: as for ``scheduled``, or another argument is out of range.

    Example:
        >>> from vlmprune import FastV
        >>> from vlmprune.policies.schedule import stage_counts
        >>> def score(policy):  # needs 100 of 320 tokens up to layer 8, and 10 behind it
        ...     left = dict(stage_counts(policy, 320))
        ...     return float(min(left.values()) >= 10 and all(n >= 100 for layer, n in left.items() if layer < 8))
        >>> g_search(score, FastV(), (2, 8), 0.0)
        (0.3125, 0.03125)
    """
    _check_single(policy)
    layers = plain(tuple(layers))
    check_layers(layers, 0)
    check_whole("levels", levels, 1)
    check_number("tolerance", tolerance, least=0)
    enough = score(scheduled(policy, layers[:1], (1.0,))) - tolerance
    check(not math.isnan(enough), "score", "a number", enough)
    found: list[int] = []
    for i in range(len(layers)):
        low, high = 0, found[-1] if found else levels  # high keeps the score: nothing has changed with it
        while high - low > 1:
            tried = (low + high) // 2
            shares = [n / levels for n in (*found, tried)]
            good = score(scheduled(policy, layers[: i + 1], shares)) >= enough
            low, high = (low, tried) if good else (tried, high)
        found.append(high)
    return tuple(n / levels for n in found)


def _check_single(policy: object) -> None:
    settings = policy.__dataclass_fields__ if isinstance(policy, PruningPolicy) else {}
    single = {"layer", "keep"} <= settings.keys()
    check(single, "policy", "a policy with settings 'layer' and 'keep', such as FastV()", repr(policy))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
