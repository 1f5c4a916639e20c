"""Every policy of the registry, and what is made of several, under the check that authors of other policies use too."""

import pytest
import torch

from vlmprune import policies
from vlmprune.policies import (
    Custom,
    Feather,
    Intersection,
    Random,
    Reduction,
    SparseVLM,
    Stages,
    Uniform,
    Union,
    VisionZip,
    VisPruner,
)
from vlmprune.policies.registry import BUILT_IN
from vlmprune.testing import check_policy
from vlmprune.testing.context import make_context
from vlmprune.testing.context_changes import broken, halved

# Settings that fit images of 20 tokens. A method without a row here fails the first test.
METHODS = {
    "fastv": [dict(), dict(keep=5, rows="mean")],
    "feather": [dict(layers=(1, 4)), dict(layers=(2, 3), keep=0.9, stride=2)],
    "pyramiddrop": [dict(layers=(2, 4)), dict(layers=(0, 2, 4), ratio=(0.5, 0.2, 0.1), positions="keep")],
    "sparsevlm": [
        dict(layers=(3, 7), keep=(5, 0.5)),
        dict(layers=(3,), keep=(0.3,), merge="sum", positions="keep"),
        dict(layers=(3,), keep=(5,), recycle=False),
        dict(layers=(3,), version="1.0", tokens=64),
        dict(layers=(3,), version="paper", scale=0.7),
    ],
    "sparsevlm_plus": [dict(layers=(3,), keep=(5,), heads=3)],
    "dart": [
        dict(keep=8),
        dict(keep=0.3, pivots=(2, 3), count="exact"),
        dict(keep=2, pivots=(0, 4)),
        dict(keep=2, pivots=(0, 4), count="exact"),
    ],
    "vscan": [dict(keep=8, then=4, window=2, shallow_layer=1)],
    "fastervlm": [dict(keep=6), dict(keep=0.5, positions="keep")],
    "visionzip": [dict(dominant=5, contextual=2), dict(dominant=5, contextual=2, positions="keep")],
    "vispruner": [dict(keep=6), dict(keep=5, positions="keep")],
    "divprune": [dict(keep=6), dict(positions="keep")],
    "cdpruner": [dict(keep=6), dict(keep=6, relevance="none", positions="keep")],
    "random_deep": [dict(keep=0.2)],
    "random": [dict(keep=0.4, seed=7), dict(layer=0, keep=3)],
    "uniform": [dict(), dict(keep=5), dict(stride=2)],
}
SOME_GO = {"sparsevlm", "sparsevlm_plus"}  # whatever the settings: min(k, n - 1)
KEEP_ALL = {
    "fastv": [dict(keep=1.0), dict(keep=10_000, rows="mean")],
    "feather": [dict(layers=(2, 3), keep=1.0)],
    "pyramiddrop": [dict(ratio=1.0), dict(ratio=(1.0, 1.0, 1.0), positions="keep")],
    "dart": [dict(keep=1.0, count="exact")],
    "vscan": [dict(keep=1.0, then=1.0, window=2)],
    "fastervlm": [dict(keep=1.0)],
    "visionzip": [dict(dominant=10_000, contextual=3)],
    "vispruner": [dict(keep=1.0)],
    "divprune": [dict(keep=1.0)],
    "cdpruner": [dict(keep=1.0)],
    "random_deep": [dict(keep=1.0)],
    "random": [dict(keep=1.0), dict(keep=10_000)],
    "uniform": [dict(keep=1.0), dict(keep=10_000), dict(stride=1)],
}


def every_other(ctx):
    even = torch.arange(0, ctx.mask.shape[1] + 1, 2).expand(len(ctx.counts), -1)
    return torch.where(even < torch.tensor(ctx.counts)[:, None], even, -1)


def made(table):
    return [policies.policy_class(name)(**row) for name, rows in table.items() for row in rows]


def stage(name, **settings):
    return policies.policy_class(name)(**settings)


COMPOSED = [
    Stages([stage("fastv", layer=1, keep=0.2), stage("random", layer=4)]),
    Stages([stage("fastervlm", keep=6), stage("sparsevlm", layers=(3,), keep=(3,))]),
    stage("fastv", keep=4) | stage("uniform", stride=3) | stage("random", keep=0.1),
    stage("fastv", keep=0.6) & stage("uniform", keep=0.6),
    Custom(2, every_other),
]
COMPOSED_KEEP_ALL = [
    Stages([stage("random", layer=2, keep=1.0), stage("uniform", layer=3, keep=36)]),
    stage("random", keep=1) | stage("fastv", keep=1.0),
    stage("random", keep=1.0) & stage("uniform", stride=1),
]
POLICIES = [*made(METHODS), *COMPOSED]
ALL_STAY = [*made(KEEP_ALL), *COMPOSED_KEEP_ALL]


def test_every_method_is_here():
    assert METHODS.keys() == BUILT_IN.keys()
    assert KEEP_ALL.keys() == BUILT_IN.keys() - SOME_GO
    assert len(set(POLICIES)) == len(POLICIES)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_holds_what_every_policy_holds(policy):
    ran = check_policy(policy)
    assert f"layer {policy.layers[-1]}, one token" in ran and ran[-1] == "settings are a value"
    assert type(policy).summary


@pytest.mark.parametrize("keep_all", ALL_STAY, ids=repr)
def test_all_stay(keep_all):
    ran = check_policy(stage("uniform", layer=0), keep_all=keep_all)
    assert all(f"layer {layer}, keep_all, a padded batch" in ran for layer in keep_all.layers)


def chosen(policy, ctx):
    choice = policy.select(ctx)
    return choice.index if isinstance(choice, Reduction) else choice


def counts(policy, ctx):
    return (chosen(policy, ctx) >= 0).sum(1).tolist()


def counts_by_data(policy):
    """Whether how many stay depends on which: a union with a grid, an overlap, a rank."""
    rank = isinstance(policy, SparseVLM) and policy.version != "1.5"
    return rank or isinstance(policy, Feather | Union | Intersection)


@pytest.mark.parametrize("policy", [p for p in POLICIES if not counts_by_data(p)], ids=repr)
def test_counts_do_not_depend_on_the_values(policy):
    """Not on NaN or infinities in one sample, nor on the precision."""
    for layer in policy.layers:
        ctx = make_context(policy.needs(layer), [[(4, 5)], [], [(5, 4), (2, 10)]], layer)
        wanted = counts(policy, ctx)
        for value in (float("nan"), float("inf")):
            assert counts(policy, broken(ctx, 2, value)) == wanted
        for dtype in (torch.float16, torch.bfloat16):
            assert counts(policy, halved(ctx, dtype)) == wanted


def chooses_by_more_than_scores(policy):
    """By place, chance or distance as well."""
    if isinstance(policy, Stages):
        return any(map(chooses_by_more_than_scores, policy.policies))
    return isinstance(
        policy, Custom | Feather | Intersection | Random | Uniform | Union | VisionZip | VisPruner
    )


@pytest.mark.parametrize("policy", [p for p in POLICIES if not chooses_by_more_than_scores(p)], ids=repr)
def test_a_sample_of_nan_keeps_its_first_tokens(policy):
    for layer in policy.layers:
        ctx = make_context(policy.needs(layer), [[(4, 5)], [(5, 4)], [(2, 10)]], layer)
        sound, index = chosen(policy, ctx), chosen(policy, broken(ctx, 1, float("nan")))
        first = list(range(index.shape[1]))
        assert index[1].tolist() == first
        if policy != stage("fastv", keep=5, rows="mean"):  # more rows see the first tokens
            assert any(row != first for row in sound.tolist())
