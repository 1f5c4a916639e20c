"""WithoutSinks against loops: sinks by the paper's formula, then the best of the others, and sinks only for want of them."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.contexts import case, kept_lists
from vlmprune.policies import (
    VTW,
    Custom,
    DivPrune,
    FasterVLM,
    FastV,
    Feather,
    KNorm,
    Needs,
    PyramidDrop,
    Random,
    RandomDeep,
    SparseVLM,
    SparseVLMPlus,
    Stages,
    Uniform,
    WithoutSinks,
)
from vlmprune.testing import check_policy

CASES = [["square"], ["two", "none", "tall"], ["square", "tall"]]
RANKS = [
    FastV(),
    FastV(keep=5, rows="mean"),
    Feather(layers=(1, 4)),
    PyramidDrop(layers=(2, 4)),
    SparseVLM(layers=(3,), keep=(5,), recycle=False),
    SparseVLMPlus(layers=(3,), keep=(5,), heads=3),
    KNorm(keep=5),
    FasterVLM(keep=6),
    FasterVLM(keep=0.5, spend="prompt", positions="keep"),
    Random(layer=0, keep=3, spend="image"),
    Uniform(keep=5),
    Stages([FasterVLM(keep=0.7), FastV(layer=3, keep=4)]),
]


def massive(ctx, share=0.3, dimension=5, value=50.0):
    """A context in which a random share of the tokens has a massive activation; and which they are."""
    torch.manual_seed(3)
    sinks = (torch.rand(ctx.mask.shape) < share) & ctx.mask
    hidden = ctx.hidden.clone()
    hidden[..., dimension] = torch.where(sinks, -value, hidden[..., dimension])
    return replace(ctx, hidden=hidden), sinks


def slow_sinks(row, tau, dimensions):
    """Whether one token is a sink: |h_d| / sqrt(mean h^2 + 1e-6) > tau in some sink dimension d."""
    size = math.sqrt(sum(x * x for x in row) / len(row) + 1e-6)
    return any(abs(row[d]) / size > tau for d in dimensions or range(len(row)))


def slow(scores, sinks, count):
    """The best by score of those that are none, then sinks in their order."""
    order = sorted(range(len(scores)), key=lambda i: (sinks[i], 0.0 if sinks[i] else -scores[i], i))
    return sorted(order[:count])


@pytest.mark.parametrize("images", CASES, ids=str)
@pytest.mark.parametrize("keep", [2, 0.5, 0.9])
@pytest.mark.parametrize("dimensions", [(), (5,), (4, 6)], ids=str)
def test_equals_the_loops(images, keep, dimensions):
    ctx, _ = massive(case(images).ctx, value=4.0)
    plain = KNorm(keep=keep)
    scores = plain.rank(ctx).scored().tolist()
    policy = WithoutSinks(plain, tau=1.5, dimensions=dimensions)
    got, found = kept_lists(policy.select(ctx)), 0
    for sample, n in enumerate(ctx.counts):
        rows = ctx.hidden[sample, :n].tolist()
        sinks = [slow_sinks(row, 1.5, dimensions) for row in rows]
        found += sum(sinks)
        count = len(kept_lists(plain.select(ctx))[sample])
        assert got[sample] == slow(scores[sample][:n], sinks, count)
    assert found > 0


def test_sinks_stay_only_for_want_of_others():
    ctx, sinks = massive(case(["square"]).ctx)
    limit = math.sqrt(ctx.hidden.shape[2]) * 0.9
    others = int((~sinks).sum())
    for count in (others - 1, others, others + 2):
        kept = set(kept_lists(WithoutSinks(FastV(keep=count), tau=limit).select(ctx))[0])
        first = set(sinks[0].nonzero()[:, 0].tolist()[: max(0, count - others)])
        assert kept & set(sinks[0].nonzero()[:, 0].tolist()) == first and len(kept) == count


def test_nothing_is_a_sink_without_massive_values():
    for images in CASES:
        ctx = case(images).ctx
        assert torch.equal(WithoutSinks(FastV()).select(ctx), FastV().select(ctx))


@pytest.mark.parametrize("method", RANKS, ids=repr)
def test_holds_what_every_policy_holds(method):
    """Around every kind of ranking, with so low a limit that many tokens are sinks."""
    check_policy(WithoutSinks(method, tau=2.0))


def test_what_stays_whatever_its_score_stays():
    """FEATHER's grid is no competition."""
    ctx, sinks = massive(case(["square"], layer=1).ctx, share=1.0)
    feather = Feather(layers=(1, 2), keep=0.1, stride=2)
    grid = set(kept_lists(feather.select(ctx))[0]) & set(
        kept_lists(WithoutSinks(feather, 2.0).select(ctx))[0]
    )
    assert len(grid) >= 9 and sinks.all() and WithoutSinks(feather, 2.0).sinks(ctx).all()


def test_what_it_reads_and_costs_is_the_methods():
    policy = WithoutSinks(Stages([FastV(layer=2, keep=0.5), RandomDeep(5, 0.5)]), dimensions=[1, 2])
    assert policy.layers == (2, 5) and policy.growth == "n" and policy.dimensions == (1, 2)
    assert policy.needs(2) == Needs(hidden=True, attention="previous")
    assert policy.needs(5) == Needs(hidden=True)
    assert policy.kept(100, 1, 2) == 50 and policy.at(0.2).method == policy.method.at(0.2)
    withdrawn = WithoutSinks(Stages([FastV(layer=2), VTW(layer=5)]))
    assert [withdrawn.empties(layer) for layer in withdrawn.layers] == [False, True]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WithoutSinks("fastv"), r"^method: expected a policy, got 'fastv'$"),
        (
            lambda: WithoutSinks(DivPrune()),
            r"^method: expected a policy that ranks at each of its layers, got Div",
        ),
        (
            lambda: WithoutSinks(FastV() | Random()),
            r"^method: expected a policy that ranks at each of its layers",
        ),
        (
            lambda: WithoutSinks(Custom(2, len)),
            r"^method: expected a policy that ranks at each of its layers",
        ),
        (lambda: WithoutSinks(FastV(), 0.0), r"^tau: expected a number greater than 0, got 0\.0$"),
        (lambda: WithoutSinks(FastV(), float("nan")), r"^tau: expected a number greater than 0, got nan$"),
        (lambda: WithoutSinks(FastV(), dimensions=3), r"^dimensions: expected a tuple of them, got 3$"),
        (
            lambda: WithoutSinks(FastV(), dimensions=(-1,)),
            r"^dimensions: expected a whole number >= 0, got -1$",
        ),
        (
            lambda: WithoutSinks(FastV(rectify=True)),
            r"^method: expected rectify=False as WithoutSinks itself",
        ),
        (
            lambda: WithoutSinks(FastV(), dimensions=(3, 4096)).select(case(["square"]).ctx),
            r"^dimensions: expected below the model's \d+, got 4096$",
        ),
        (
            lambda: WithoutSinks(FastV()).select(replace(case(["square"]).ctx, hidden=None)),
            r"^ctx\.hidden: expected hidden states",
        ),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
