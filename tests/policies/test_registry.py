"""Names of policies: built-in, announced by other packages, and parsed from the command line."""

import dataclasses
import re
from importlib import metadata
from typing import Literal

import numpy as np
import pytest
import torch

from helpers.methods import usual
from vlmprune.errors import InputError
from vlmprune.flops import layer_inputs, mean_tokens
from vlmprune.policies import (
    FastV,
    Feather,
    PruningPolicy,
    PyramidDrop,
    Random,
    SparseVLM,
    Stages,
    Uniform,
    list_policies,
    policy_from,
    registry,
)
from vlmprune.policies.budgets import PUBLISHED
from vlmprune.policies.recipe import read_setting, spell_type
from vlmprune.policies.registry import fields_of, policies
from vlmprune.policies.schedule import stage_counts
from vlmprune.policies.syntax import Word


@dataclasses.dataclass(frozen=True)
class Foreign(PruningPolicy):
    """A policy of another package, with every kind of setting."""

    places: tuple[int, ...]
    name: str = "x"
    deep: bool = False
    pair: tuple[int, float] | None = None
    sizes: tuple[int, ...] = dataclasses.field(default_factory=tuple)

    @property
    def layers(self):
        return self.places

    def select(self, ctx):
        return ctx.ordinals


BROKEN = "not a class"


class Abstract(PruningPolicy):
    """Forgets to choose."""

    @property
    def layers(self):
        return (2,)


@dataclasses.dataclass(frozen=True)
class Nowhere(PruningPolicy):
    """Acts at no layer."""

    layers: tuple[int, ...] = ()

    def select(self, ctx):
        return ctx.ordinals


@dataclasses.dataclass(frozen=True)
class Unnamed(PruningPolicy):
    """Says nothing where a text is shown."""

    layer: int = 2
    paper = None

    def select(self, ctx):
        return ctx.ordinals


@dataclasses.dataclass(frozen=True)
class Picky(PruningPolicy):
    """Refuses a setting as Python programs do."""

    layers: tuple[int, ...] = (2,)
    size: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError("size must be positive")

    def select(self, ctx):
        return ctx.ordinals


@dataclasses.dataclass(frozen=True)
class Namesake(Picky):
    """Has a setting where a dict has the policy's name."""

    policy: str = "x"


@dataclasses.dataclass(frozen=True)
class Confused(Picky):
    """Fails when it is asked what it needs."""

    def needs(self, layer):
        return {}["attention"]


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
@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.model)
def test_presets_meet_their_budget(name, model):
    """Mean over the inputs of the model's layers, from one image. SparseVLM's authors count 192, 128, 64 after each layer."""
    known = [budget for budget in model.budgets if budget in policies()[name].presets]
    for budget in known:
        policy = policy_from(f"{name}:{policies()[name].presets[budget]}")
        for visual in [model.visual] if model.visual else [1296, 1296 * 4, 324]:
            mean = mean_tokens(layer_inputs(model.layers, visual, stage_counts(policy, visual)))
            if model.visual is None:
                # what small images lose to whole numbers, and gain by the edge of FEATHER's grid
                assert budget - 2 / visual - 0.001 <= mean / visual <= budget + 1 / visual + 0.0005
            else:
                slack = 19 if name.startswith("sparsevlm") and model.visual == 576 else 1
                assert budget - 1 <= mean <= budget + slack
    assert known == list(model.budgets[: len(known)])  # what lacks a preset lacks those below it


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_presets_for_three_axes_pack_nothing(name):
    for budget, settings in policies()[name].presets.items():
        policy = policy_from(f"{name}:{settings}")
        if isinstance(budget, float) and "positions" in fields_of(type(policy)):
            assert policy.positions == "keep"


def test_presets_are_of_published_budgets():
    every = {budget for model in PUBLISHED for budget in model.budgets}
    for name, kind in registry.BUILT_IN.items():
        assert kind.presets.keys() <= every, name
    assert {name for name, kind in registry.BUILT_IN.items() if kind.presets.keys() == every} == {
        *("accm_selection", "aim", "cdpruner", "divprune", "fastervlm", "fitprune", "flowcut", "folder"),
        "lvlm_csp",
        *("random", "star", "uniform", "visionzip", "vispruner", "vscan"),
        *("prumerge", "trim", "tome", "visiontrim"),
        *("globalcom2", "hiprune", "hired", "holov"),
        *("agilepruner", "mmtok", "prunesid", "scope", "zoo_prune"),
    }


def test_fields_of():
    every = ("earlier_kv", "full"), ("rectify", False)
    assert [*fields_of(FastV).items()] == [
        ("layer", 2),
        ("keep", 0.5),
        ("rows", "last"),
        ("spend", "prompt"),
        *every,
    ]
    assert [*fields_of(Feather).items()] == [
        ("layers", (8, 16)),
        ("keep", 0.3),
        ("stride", 3),
        ("rounding", "exact"),
        *every,
    ]
    assert [*fields_of(Random).items()] == [
        ("layer", 2),
        ("keep", 0.5),
        ("seed", 0),
        ("spend", "prompt"),
        *every,
    ]
    assert [*fields_of(Uniform).items()] == [
        ("layer", 2),
        ("keep", 0.25),
        ("stride", None),
        ("order", "lattice"),
        *every,
    ]
    assert next(iter(fields_of(Foreign).items())) == ("places", dataclasses.MISSING)
    assert [*fields_of(Foreign).items()][-3] == ("sizes", ())


@pytest.mark.parametrize(
    "text, policy",
    [
        ("fastv", FastV()),
        ("fastv:layer=3,keep=64", FastV(layer=3, keep=64)),
        ("fastv:keep=1.0,rows=mean", FastV(keep=1.0, rows="mean")),
        ("feather:layers=2/5,keep=0.3", Feather(layers=(2, 5), keep=0.3)),
        ("feather:keep=1.0,stride=2", Feather(keep=1.0, stride=2)),
        ("fastv:keep=1", FastV(keep=1)),
        ("sparsevlm:keep=1/1/1", SparseVLM(keep=(1, 1, 1))),
        ("pyramiddrop:ratio=1e0", PyramidDrop(ratio=1.0)),
        ("pyramiddrop:ratio=1e+0", PyramidDrop(ratio=1.0)),
        ("fastv:keep=1.E+0+random:layer=5", Stages([FastV(keep=1.0), Random(layer=5)])),
        ("random:seed=12,keep=5e-1", Random(seed=12)),
        ("uniform", Uniform()),
        ("uniform:keep=0.5", Uniform(keep=0.5)),
        ("uniform:stride=3,layer=0", Uniform(stride=3, layer=0)),
        ("uniform:order=raster", Uniform(order="raster")),
        ("uniform:keep=none", Uniform()),
    ],
)
def test_parse(text, policy):
    assert policy_from(text) == policy
    assert repr(policy_from(text)) == repr(policy)  # 64 is not 64.0


@pytest.mark.parametrize(
    "policy", [FastV(3, 64, "mean"), Feather((2, 5), 0.4, 2), Random(4, 0.25, 9), Uniform(1, 7)]
)
def test_parse_inverts_writing(policy):
    def write(value):
        return "/".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()

    values = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    items = ",".join(f"{name}={write(value)}" for name, value in values.items() if value is not None)
    assert policy_from(f"{type(policy).__name__.lower()}:{items}") == policy


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "fastvv",
            r"^policy: expected one of fastv, feather, .*, random, uniform, got 'fastvv' \(did you mean 'fastv'\?\)$",
        ),
        ("", r"^policy: expected one of .*, got ''$"),
        ("FastV", r"^policy: expected one of .*, got 'FastV' \(did you mean 'fastv'\?\)$"),
        ("fastv:", r"^policy fastv: expected field=value, \.\.\., got ''$"),
        ("fastv:layer", r"^policy fastv: expected field=value, \.\.\., got 'layer'$"),
        (
            "fastv:layr=2",
            r"^policy fastv: expected one of the fields layer, keep, rows, spend, earlier_kv, rectify, got 'layr' \(did you mean 'layer'\?\)$",
        ),
        ("fastv:summary=2", r"^policy fastv: expected one of the fields .*, got 'summary'$"),
        ("fastv:layer=1,layer=2", r"^policy fastv: expected each field once, got layer twice$"),
        ("fastv:layer=two", r"^layer: expected int, got 'two'$"),
        ("fastv:layer=2.0", r"^layer: expected int, got '2\.0'$"),
        ("fastv:keep=half", r"^keep: expected int or float, got 'half'$"),
        ("fastv:keep=nan", r"^keep: expected a share in \(0, 1\] .*, got nan$"),
        ("feather:keep=1", r"^keep: expected float \(with a decimal point, as in 1\.0\), got '1'$"),
        ("feather:keep=half", r"^keep: expected float, got 'half'$"),
        (
            "pyramiddrop:ratio=1/0.5/0.2",
            r"^ratio: expected float or float/\.\.\. \(with a decimal point, .*, got '1/0\.5/0\.2'$",
        ),
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
    with pytest.raises(InputError, match=message):
        policy_from(text)


def test_foreign_policy(foreign):
    assert list_policies()[-1] == "foreign" and foreign == []  # names load nothing
    assert policy_from("fastv") == FastV() and foreign == []
    assert policies()["foreign"] is Foreign
    assert policy_from("foreign:places=1/2/3,deep=true,pair=4/0.5") == Foreign(
        (1, 2, 3), deep=True, pair=(4, 0.5)
    )
    assert policy_from("foreign:places=1,name=a b,pair=none,sizes=1") == Foreign((1,), "a b", sizes=(1,))


def test_foreign_policy_errors(foreign):
    with pytest.raises(ValueError, match=r"^policy foreign: expected a value for places, got none$"):
        policy_from("foreign")
    with pytest.raises(ValueError, match=r"^deep: expected true or false, got 'yes'$"):
        policy_from("foreign:places=1,deep=yes")
    with pytest.raises(ValueError, match=r"^pair: expected int/float or none, got '1'$"):
        policy_from("foreign:places=1,pair=1")


@pytest.mark.parametrize(
    "value, said",
    [
        ("nosuchmodule:Broken", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        (
            "vlmprune.policies.methods.fastv:Slow",
            "AttributeError: module 'vlmprune.policies.methods.fastv' has no attribute 'Slow'",
        ),
        ("elsewhere:BROKEN", "TypeError: 'not a class' is no PruningPolicy class"),
        ("elsewhere:Abstract", "InputError: Abstract: expected `rank` or `select` of its own, got neither"),
        ("elsewhere:Namesake", "TypeError: a setting called 'policy'"),
        ("elsewhere:Nowhere", r"InputError: layers: expected at least one with default settings, got ()"),
        ("elsewhere:Unnamed", "InputError: paper: expected a text, got None"),
        ("elsewhere:Confused", "KeyError: 'attention'"),
    ],
)
def test_a_broken_package_is_left_out_and_named(value, said, announce, monkeypatch):
    """The others stay, and whoever asks for it is told what is wrong."""
    real = metadata.EntryPoint.load
    mine = lambda entry: globals()[entry.attr] if entry.module == "elsewhere" else real(entry)  # noqa: E731
    monkeypatch.setattr(metadata.EntryPoint, "load", mine)
    announce(broken=value, picky="elsewhere:Picky")
    assert list_policies() == [*registry.BUILT_IN, "broken", "picky"]
    found, (fault,) = registry.load_policies()
    assert found == policies() and list(found) == [*registry.BUILT_IN, "picky"]
    assert fault.startswith(f"policy broken: expected a policy in {value}, got {said}") and "\n" not in fault
    with pytest.raises(InputError, match=f"^{re.escape(fault)}$"):
        policy_from("broken:layer=2")
    with pytest.raises(
        InputError,
        match=r"^policy: expected one of fastv, .*, broken, picky, got 'fastvv' \(did you mean 'fastv'\?\)$",
    ):
        policy_from("fastvv")


def test_a_plain_value_error_of_a_foreign_policy_is_bad_input(announce, monkeypatch):
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda entry: Picky)
    announce(picky="elsewhere:Picky")
    with pytest.raises(InputError, match=r"^policy picky: size must be positive$"):
        policy_from("picky:size=0")


def test_the_name_of_a_built_in_policy_stays_its_own(announce):
    announce(fastv="elsewhere:Other")
    assert list_policies() == list(registry.BUILT_IN)
    assert policy_from("fastv") == FastV()
    found, faults = registry.load_policies()
    assert found["fastv"] is FastV
    assert faults == ["policy fastv: expected a name of its own for elsewhere:Other, got a built-in policy's"]


def test_two_packages_with_one_name(announce, foreign):
    """None of the two is taken; from one and the same place it is no clash."""
    announce(mine__1="one:Foreign", mine__2="two:Foreign", same__1="one:Foreign", same__2="one:Foreign")
    assert list_policies() == [*registry.BUILT_IN, "mine", "same"]
    found, faults = registry.load_policies()
    assert list(found) == [*registry.BUILT_IN, "same"]
    assert faults == ["policy mine: expected one package that announces it, got one:Foreign and two:Foreign"]
    with pytest.raises(InputError, match=r"^policy mine: expected one package that announces it"):
        policy_from("mine")
    assert policy_from("same:places=1") == Foreign((1,))


ODD = (
    None,
    0,
    1,
    -1,
    64,
    True,
    0.5,
    2.5,
    float("nan"),
    "x",
    (),
    (1,),
    (None, None, None),
    (0.5, "x", 1),
    [[1]],
)
ODD += (np.int64(2), np.float32(0.5), np.bool_(True), (np.int64(3), 7, 16), torch.ones(2), {}, len)
ODD += (np.array(2), np.array([1, 2]), np.array(["last"]), np.array([]), (np.ones(2), 1), [np.array(8), 16])


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_a_setting_is_taken_or_refused_by_name(name):
    """Never another error than ours, and it says which setting."""
    known = fields_of(registry.BUILT_IN[name])
    for field in known:
        for value in ODD:
            try:
                made = usual(name, **{field: value})
            except InputError as error:
                assert str(error).startswith((*known, "layer:")) and ": expected " in str(error)
            else:
                assert "np." not in repr(made) and "array" not in repr(made)
                hash(made)


def test_numbers_of_numpy():
    """They become Python's, also inside a tuple or a list, before a policy checks them, whatever its own check does."""
    for policy, same in (
        (FastV(keep=np.float64(0.5)), FastV(keep=0.5)),
        (FastV(2, np.int64(64)), FastV(2, 64)),
        (Feather(layers=[np.int64(8), 16]), Feather(layers=(8, 16))),
        (Random(keep=np.float32(0.5)), Random(keep=0.5)),
        (SparseVLM(keep=(np.int32(5), np.float16(0.5), 1)), SparseVLM(keep=(5, 0.5, 1))),
        (Foreign((np.int64(1),), pair=(np.int8(4), 0.5)), Foreign((1,), pair=(4, 0.5))),
        (FastV().at(np.float32(0.5)), FastV(keep=0.5)),
        (FastV(keep=np.array(0.5), layer=np.array(3)), FastV(layer=3, keep=0.5)),
        (Feather(layers=np.array([2, 5])), Feather(layers=(2, 5))),
        (Foreign([1, [2]]), Foreign((1, (2,)))),
    ):
        assert policy == same and repr(policy) == repr(same)
    with pytest.raises(InputError, match=r"^keep: expected a share .*, got True$"):
        FastV(keep=np.bool_(True))
    with pytest.raises(InputError, match=r"^earlier_kv: expected 'full' or 'compact', got 'half'$"):
        Foreign((1,), earlier_kv="half")


class Towered(PruningPolicy):
    def rank(self, ctx):
        return Random(keep=1).rank(ctx)


def test_what_the_base_class_checks_of_settings():
    """Words that mean the same everywhere; and a vision layer where a class declares an int, as it may mean something else."""

    @dataclasses.dataclass(frozen=True)
    class Own(Towered):
        vision_layer: tuple[int, ...] | None = None

    @dataclasses.dataclass(frozen=True)
    class Found(Towered):
        vision_layer: int = dataclasses.field(init=False)

        def __post_init__(self):
            object.__setattr__(self, "vision_layer", -2)

    @dataclasses.dataclass(frozen=True)
    class Usual(Towered):
        vision_layer: int = -2
        positions: str = "keep"
        spend: str = "prompt"

    assert Own((1, 2)).vision_layer == (1, 2) and Own().vision_layer is None and Found().vision_layer == -2
    for settings, message in (
        ({"vision_layer": None}, r"^vision_layer: expected a whole number, got None$"),
        ({"vision_layer": -2.0}, r"^vision_layer: expected a whole number, got -2.0$"),
        ({"positions": "own"}, r"^positions: expected 'keep' or 'pack', got 'own'$"),
        ({"spend": "tile"}, r"^spend: expected 'prompt', 'image' or 'crop', got 'tile'$"),
    ):
        with pytest.raises(InputError, match=message):
            Usual(**settings)


def test_a_whole_number_where_only_shares_are_taken():
    with pytest.raises(
        InputError, match=r"^keep: expected a share .* as a float \(1\.0 is everything\), got 1$"
    ):
        Feather(keep=1)
    with pytest.raises(
        InputError, match=r"^ratio: expected a share .* as a float \(1\.0 is everything\), got 1$"
    ):
        PyramidDrop(ratio=1)
    with pytest.raises(InputError, match=r"^keep: expected one entry per layer, in a tuple, got 64$"):
        SparseVLM(keep=64)


def test_real_entry_point_import(announce):
    announce(other="vlmprune.policies.methods.fastv:FastV")
    assert policies()["other"] is FastV


def test_spelling_and_unreadable_types():
    assert spell_type(tuple[int, ...] | Literal["a", 2] | None) == "int/... or 'a' or 2 or none"
    assert read_setting(Word("2"), Literal["a", 2], "x") == 2
    with pytest.raises(ValueError, match=r"^x: expected dict, got '1'$"):
        read_setting(Word("1"), dict, "x")
