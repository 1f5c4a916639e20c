"""How the work of a choice grows: what every built-in method says is what counting its operations shows."""

import dataclasses
import math

import pytest
import torch

from helpers.methods import usual
from helpers.work import Work, work_of
from vlmprune.cli.facts import describe_policy
from vlmprune.cli.listing import markdown_table
from vlmprune.errors import InputError
from vlmprune.policies import (
    CDPruner,
    Custom,
    DivPrune,
    FasterVLM,
    FastV,
    PruningPolicy,
    Random,
    SparseVLM,
    Stages,
    Uniform,
    VisionZip,
)
from vlmprune.policies.parts import lattice
from vlmprune.policies.registry import BUILT_IN
from vlmprune.testing.context import make_context

pytestmark = pytest.mark.cpu("operations are counted, which are the same everywhere")
GRIDS = ((16, 32), (32, 32), (32, 64))
# of many stages that are alike: one
FEWER = {
    "ficoco": {"layers": (6,)},
    "fitprune": {"layers": (2,), "drop": 0.5},
    "aim": {"stages": 1},
    "zoo_prune": {"directions": 1},
}
SMALL, AGAIN = ((8, 16), (16, 16), (16, 32)), ("scope", "mmtok")  # every choice looks at all pairs again
WITHIN = {"n": (0.9, 1.2), "n^2": (1.5, 2.2), "n^3": (2.6, 3.2)}


def exponent(works, grids=GRIDS):
    """The slope of log(work) over log(tokens), least squares."""
    x = torch.tensor([[math.log(math.prod(grid)), 1.0] for grid in grids], dtype=torch.float64)
    y = torch.tensor([math.log(work) for work in works], dtype=torch.float64)
    return float(torch.linalg.lstsq(x, y[:, None]).solution[0])


def measured(policy, monkeypatch, grids=GRIDS, **settings):
    """The exponent of the work at all its stages, of a prompt of one image that is not the first of its kind."""
    works = []
    for grid in grids:
        contexts = [make_context(policy.needs(k), [[grid]], k, **settings) for k in policy.layers]
        for ctx in contexts:
            policy.select(ctx)
        works.append(sum(work_of(lambda ctx=ctx: policy.select(ctx), monkeypatch) for ctx in contexts))
    return exponent(works, grids)


def assert_grows(policy, growth, monkeypatch, **settings):
    low, high = WITHIN[growth]
    assert low <= measured(policy, monkeypatch, **settings) <= high


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_grows_as_it_says(name, monkeypatch):
    policy = usual(name, **FEWER.get(name, {}))
    policy = policy if name == "vtw" else policy.at(0.25)  # it keeps nothing
    assert_grows(policy, policy.growth, monkeypatch, grids=SMALL if name in AGAIN else GRIDS)


@pytest.mark.parametrize(
    "policy, growth",
    [
        (FastV(rows="mean"), "n^2"),
        (SparseVLM(recycle=False).at(0.25), "n"),
        (Uniform(stride=3), "n"),
        (FastV() | Uniform(), "n"),
        (FastV() & SparseVLM(layers=(2,), keep=(0.25,), recycle=False, positions="keep"), "n"),
        (Stages([DivPrune(keep=0.25), FastV()]), "n^2"),
    ],
    ids=str,
)
def test_settings_and_compositions(policy, growth, monkeypatch):
    assert policy.growth == growth
    assert_grows(policy, growth, monkeypatch)


def test_what_documentation_adds(monkeypatch):
    """Without CLS all pairs are looked at; a fixed number of tokens saves one power where its rounds are as many."""
    assert_grows(FasterVLM(), "n^2", monkeypatch, cls=False)
    assert_grows(VisionZip(tokens=64), "n", monkeypatch)
    assert_grows(CDPruner(keep=16), "n^2", monkeypatch)


def test_a_new_lattice_takes_more():
    works = []
    for rows, columns in GRIDS:
        lattice.lattice.cache_clear()
        with Work() as work:
            lattice.lattice((rows, columns), rows * columns // 4)
        works.append(work.total)
    assert 1.3 <= exponent(works) <= 1.6


def test_the_worst_counts_however_deep_it_lies():
    assert (FastV() | (FastV(rows="mean") & Random())).growth == "n^2"
    assert Stages([CDPruner(keep=0.25), FastV() | Random()]).growth == "n^3"


def test_nobody_knows_what_a_function_does():
    unknown = Custom(2, lambda ctx: ctx.ordinals)
    assert unknown.growth is None
    assert Stages([FastV(layer=1), unknown]).growth is None and (FastV() | unknown).growth is None


def test_a_word_that_does_not_exist():
    said = r"^Slow\.growth: expected one of n, n\^2, n\^3, got 'n log n'$"
    with pytest.raises(InputError, match=said):

        @dataclasses.dataclass(frozen=True)
        class Slow(PruningPolicy):
            growth = "n log n"


def test_another_package_may_say_nothing():
    """``vlmprune list`` then says so."""

    @dataclasses.dataclass(frozen=True)
    class Silent(FastV):
        growth = None

    found = {"silent": describe_policy(Silent)}
    assert found["silent"]["growth"] is None and "| unknown |" in markdown_table(found)
