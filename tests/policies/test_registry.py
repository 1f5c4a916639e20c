"""Names of policies: built-in, announced by other packages, and parsed from the command line."""

import dataclasses
from importlib import metadata
from typing import Literal

import pytest

from vlmprune.flops import layer_inputs, mean_tokens
from vlmprune.policies import (
    FastV,
    Feather,
    PruningPolicy,
    Random,
    Uniform,
    fields_of,
    list_policies,
    parse_policy,
    policies,
    registry,
)
from vlmprune.policies.schedule import stage_counts
from vlmprune.policies.settings import read_setting, spell_type


@dataclasses.dataclass(frozen=True)
class Foreign(PruningPolicy):
    """A policy of another package, with every kind of setting."""

    at: tuple[int, ...]
    name: str = "x"
    deep: bool = False
    pair: tuple[int, float] | None = None
    sizes: tuple[int, ...] = dataclasses.field(default_factory=tuple)

    @property
    def layers(self):
        return self.at

    def select(self, ctx):
        return ctx.ordinals


BROKEN = "not a class"


@pytest.fixture
def announce(monkeypatch):
    """Pretend that packages announce these entry points."""

    def install(**named):
        entries = metadata.EntryPoints(
            metadata.EntryPoint(name.partition("__")[0], value, registry.GROUP)
            for name, value in named.items()
        )
        monkeypatch.setattr(registry.metadata, "entry_points", lambda group: entries.select(group=group))

    return install


@pytest.fixture
def foreign(announce, monkeypatch):
    """One foreign policy; its entry point is loaded by a stand-in for the import."""
    loads = []
    monkeypatch.setattr(
        metadata.EntryPoint, "load", lambda entry: loads.append(entry.name) or globals()[entry.attr]
    )
    announce(foreign="elsewhere.module:Foreign")
    return loads


def test_built_in_names(announce):
    announce()
    assert list_policies() == list(registry.BUILT_IN) == list(policies())
    few = {"fastv": FastV, "feather": Feather, "random": Random, "uniform": Uniform}
    assert few.items() <= policies().items()
    assert all(p.summary and p.paper and p.checked in ("formula", "reading") for p in policies().values())


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_presets_meet_their_budget(name):
    """Mean over the inputs of 32 layers, from one image of 576 tokens. SparseVLM's authors count after each layer."""
    for budget, settings in policies()[name].presets.items():
        policy = parse_policy(f"{name}:{settings}")
        mean = mean_tokens(layer_inputs(32, 576, stage_counts(policy, 576)))
        slack = 19 if name.startswith("sparsevlm") else 1
        assert budget - 1 <= mean <= budget + slack


def test_fields_of():
    every = ("earlier_kv", "full")
    assert fields_of(FastV) == [("layer", 2), ("keep", 0.5), ("rows", "last"), every]
    assert fields_of(Feather) == [("layers", (8, 16)), ("keep", 0.3), ("stride", 3), every]
    assert fields_of(Random) == [("layer", 2), ("keep", 0.5), ("seed", 0), every]
    assert fields_of(Uniform) == [("layer", 2), ("keep", 0.25), ("stride", None), every]
    assert fields_of(Foreign)[0] == ("at", dataclasses.MISSING)
    assert fields_of(Foreign)[-2] == ("sizes", ())


@pytest.mark.parametrize(
    "text, policy",
    [
        ("fastv", FastV()),
        ("fastv:layer=3,keep=64", FastV(layer=3, keep=64)),
        ("fastv:keep=1.0,rows=mean", FastV(keep=1.0, rows="mean")),
        ("feather:layers=2/5,keep=0.3", Feather(layers=(2, 5), keep=0.3)),
        ("feather:keep=1,stride=2", Feather(keep=1.0, stride=2)),
        ("random:seed=12,keep=5e-1", Random(seed=12)),
        ("uniform", Uniform()),
        ("uniform:keep=0.5", Uniform(keep=0.5)),
        ("uniform:stride=3,layer=0", Uniform(stride=3, layer=0)),
        ("uniform:keep=none", Uniform()),
    ],
)
def test_parse(text, policy):
    assert parse_policy(text) == policy
    assert repr(parse_policy(text)) == repr(policy)  # 64 is not 64.0


@pytest.mark.parametrize(
    "policy", [FastV(3, 64, "mean"), Feather((2, 5), 0.4, 2), Random(4, 0.25, 9), Uniform(1, 7)]
)
def test_parse_inverts_writing(policy):
    def write(value):
        return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)

    values = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    items = ",".join(f"{name}={write(value)}" for name, value in values.items() if value is not None)
    assert parse_policy(f"{type(policy).__name__.lower()}:{items}") == policy


@pytest.mark.parametrize(
    "text, message",
    [
        ("fastvv", r"^policy: expected one of fastv, feather, .*, random, uniform, got 'fastvv'$"),
        ("", r"^policy: expected one of .*, got ''$"),
        ("FastV", r"^policy: expected one of .*, got 'FastV'$"),
        ("fastv:", r"^policy fastv: expected field=value, \.\.\., got ''$"),
        ("fastv:layer", r"^policy fastv: expected field=value, \.\.\., got 'layer'$"),
        (
            "fastv:layr=2",
            r"^policy fastv: expected one of the fields layer, keep, rows, earlier_kv, got 'layr'$",
        ),
        ("fastv:summary=2", r"^policy fastv: expected one of the fields .*, got 'summary'$"),
        ("fastv:layer=1,layer=2", r"^policy fastv: expected each field once, got layer twice$"),
        ("fastv:layer=two", r"^layer: expected int, got 'two'$"),
        ("fastv:layer=2.0", r"^layer: expected int, got '2\.0'$"),
        ("fastv:keep=half", r"^keep: expected int or float, got 'half'$"),
        ("fastv:keep=nan", r"^keep: expected a share in \(0, 1\] .*, got nan$"),
        ("fastv:rows=all", r"^rows: expected 'last' or 'mean', got 'all'$"),
        ("feather:layers=8", r"^layers: expected int/int, got '8'$"),
        ("feather:layers=8/x", r"^layers: expected int/int, got '8/x'$"),
        ("feather:layers=8/16/24", r"^layers: expected int/int, got '8/16/24'$"),
        ("feather:layers=16/8", r"^layers: expected two layers, ascending, got \(16, 8\)$"),
        ("uniform:keep=2,stride=3", r"^keep: expected either keep or stride, got keep=2 and stride=3$"),
    ],
)
def test_parse_rejects(text, message, announce):
    announce()
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


def test_foreign_policy(foreign):
    assert list_policies()[-1] == "foreign" and foreign == []  # names load nothing
    assert parse_policy("fastv") == FastV() and foreign == []
    assert policies()["foreign"] is Foreign
    assert parse_policy("foreign:at=1/2/3,deep=true,pair=4/0.5") == Foreign(
        (1, 2, 3), deep=True, pair=(4, 0.5)
    )
    assert parse_policy("foreign:at=1,name=a b,pair=none,sizes=1") == Foreign((1,), "a b", sizes=(1,))


def test_foreign_policy_errors(foreign):
    with pytest.raises(ValueError, match=r"^policy foreign: expected a value for at, got none$"):
        parse_policy("foreign")
    with pytest.raises(ValueError, match=r"^deep: expected true or false, got 'yes'$"):
        parse_policy("foreign:at=1,deep=yes")
    with pytest.raises(ValueError, match=r"^pair: expected int/float or none, got '1'$"):
        parse_policy("foreign:at=1,pair=1")


def test_entry_point_that_is_no_policy(foreign, announce):
    announce(broken="elsewhere:BROKEN")
    with pytest.raises(
        ValueError, match=r"^entry point broken = elsewhere:BROKEN: expected a PruningPolicy class, got"
    ):
        policies()


def test_names_may_not_clash(announce):
    announce(fastv="elsewhere:Other")
    with pytest.raises(
        ValueError, match=r"^entry point fastv = elsewhere:Other: expected a name of its own, got the"
    ):
        list_policies()
    announce(mine__1="one:Policy", mine__2="two:Policy")
    with pytest.raises(ValueError, match=r"^entry point mine = two:Policy: .*, got the name of one:Policy$"):
        list_policies()


def test_real_entry_point_import(announce):
    announce(other="vlmprune.policies.fastv:FastV")
    assert policies()["other"] is FastV


def test_spelling_and_unreadable_types():
    assert spell_type(tuple[int, ...] | Literal["a", 2] | None) == "int/... or 'a' or 2 or none"
    assert read_setting("2", Literal["a", 2], "x") == 2
    with pytest.raises(ValueError, match=r"^x: expected dict, got '1'$"):
        read_setting("1", dict, "x")
