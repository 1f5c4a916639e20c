"""Policies as data: dicts, JSON and YAML, the text of the command line, and what is wrong with them."""

import dataclasses
import json
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers.methods import typed
from vlmprune import policy_from
from vlmprune.errors import InputError
from vlmprune.policies import (
    SCOPE,
    ACCMSelection,
    CDPruner,
    Custom,
    DivPrune,
    FastV,
    Feather,
    GreedyPrune,
    Intersection,
    MMTok,
    PruningPolicy,
    PyramidDrop,
    Random,
    RandomDeep,
    Scout,
    SparseVLM,
    Stages,
    Uniform,
    Union,
    VisionZip,
    WithoutSinks,
    registry,
)
from vlmprune.policies.recipe import named, to_text, to_yaml
from vlmprune.policies.registry import BUILT_IN
from vlmprune.testing.policy import check_policy


def keep_all(ctx):
    """For a Custom policy."""
    return ctx.ordinals


class Methods:
    @staticmethod
    def keep_all(ctx):
        return ctx.ordinals

    def method(self, ctx):
        return ctx.ordinals


@dataclasses.dataclass(frozen=True)
class Foreign(PruningPolicy):
    """A policy of another package."""

    scale: float = 1
    name: str = "x"
    anything: Any = None

    @property
    def layers(self):
        return (2,)

    def select(self, ctx):
        return ctx.ordinals


@pytest.fixture
def announced(monkeypatch):
    entries = metadata.EntryPoints([metadata.EntryPoint("far", "elsewhere:Foreign", registry.GROUP)])
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: entries.select(group=group))
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda entry: Foreign)


POLICIES = [
    *(policy_from(typed(name)) for name in BUILT_IN),
    FastV(3, 64, "mean", earlier_kv="compact"),
    FastV(3, rectify=True) | Random(3, rectify=True),
    WithoutSinks(Stages([FastV(), FastV(5)]), dimensions=(3, 4)),
    FastV(keep=1),
    FastV(keep=1.0),
    FastV(keep=np.float64(0.5)),
    PyramidDrop(layers=[2, 5], ratio=(0.5, 0.25)),
    SparseVLM(version="paper", scale=2),
    SparseVLM(keep=(3, 2, 0.5)),
    Uniform(stride=3),
    VisionZip(tokens=128, count_cls=True),
    CDPruner(relevance=keep_all),
    ACCMSelection(text=0.5, relevance=keep_all, nearest=False),
    Custom(2, keep_all),
    Custom(2, Methods.keep_all),
    Stages([RandomDeep(keep=0.25), DivPrune(keep=0.5)]),
    FastV() | Uniform(),
    FastV(earlier_kv="compact") & Uniform(earlier_kv="compact") | Random(earlier_kv="compact"),
    Stages([FastV() | Custom(2, keep_all), Stages([Random(layer=4)])], earlier_kv="compact"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_there_and_back(policy, tmp_path):
    data = policy.to_dict()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    sources = (data, json.loads(json.dumps(data)), tmp_path / "recipe.yaml", str(tmp_path / "recipe.yaml"))
    for source in sources:
        again = policy_from(source)
        assert again == policy and repr(again) == repr(policy).replace("np.float64(0.5)", "0.5")
        assert again.to_dict() == data


EVERY = {"earlier_kv": "full", "rectify": False}
"""What every policy has."""


def test_the_text_of_a_file(tmp_path):
    """Also of shares that YAML reads as texts if they are written as JSON writes them."""
    policy = Stages([FastV(layer=2, keep=1e-05), Uniform(layer=3, keep=64)], earlier_kv="compact")
    (tmp_path / "p.yaml").write_text(to_yaml(policy))
    assert policy_from(tmp_path / "p.yaml") == policy


def test_the_dict():
    fastv = {
        "policy": "fastv",
        "layer": 2,
        "keep": 0.5,
        "rows": "last",
        "spend": "prompt",
        "earlier_kv": "full",
        "rectify": False,
    }
    feather = {
        "policy": "feather",
        "layers": [8, 16],
        "keep": 0.3,
        "stride": 3,
        "rounding": "exact",
        **EVERY,
    }
    assert FastV().to_dict() == fastv and list(FastV().to_dict()) == list(fastv)
    assert Stages([Feather(), FastV()]).to_dict() == {
        "policy": "stages",
        "policies": [fastv, feather],
        "earlier_kv": "full",
        "rectify": False,
    }
    pair = {"first": fastv, "second": fastv, **EVERY}
    assert (FastV() | FastV()).to_dict() == {"policy": "union", **pair}
    assert (FastV() & FastV()).to_dict() == {"policy": "intersection", **pair}
    path = f"{__name__}:Methods.keep_all"
    made = {"policy": "custom", "layer": 2, "select": path, **EVERY}
    assert Custom(2, Methods.keep_all).to_dict() == made
    assert type(FastV(keep=np.float64(0.5)).to_dict()["keep"]) is float


@pytest.mark.parametrize(
    "settings, policy",
    [
        ({"layer": np.int64(3), "keep": np.int32(1)}, FastV(3, 1)),
        ({"keep": np.float32(0.5), "rows": np.str_("mean")}, FastV(keep=0.5, rows="mean")),
        ({"policy": "feather", "layers": [np.int64(3), 5]}, Feather((3, 5))),
        ({"policy": "feather", "layers": np.array([3, 5])}, Feather((3, 5))),
        ({"policy": "visionzip", "count_cls": np.bool_(True)}, VisionZip(count_cls=True)),
    ],
)
def test_a_dict_may_hold_numbers_of_numpy(settings, policy):
    made = policy_from({"policy": "fastv"} | settings)
    assert made == policy and repr(made) == repr(policy)


def test_what_is_left_out_has_its_default():
    assert policy_from({"policy": "fastv", "layer": 3}) == FastV(layer=3)
    both = {"policy": "stages", "policies": [{"policy": "divprune"}, "random_deep:layer=20,keep=0.25"]}
    assert policy_from(both) == Stages([DivPrune(), RandomDeep(20, 0.25)])


def test_foreign_policies(announced):
    policy = Foreign(scale=1, name="007")
    assert policy.to_dict() == {
        "policy": "far",
        "scale": 1,
        "name": "007",
        "anything": None,
        "earlier_kv": "full",
        "rectify": False,
    }
    rest = {"scale": 1, "name": "007"}
    assert policy_from({"policy": "far", **rest}) == policy_from("far:scale=1.0,name=007") == policy
    with pytest.raises(
        InputError, match=r"^anything: expected data, or a function .* its name, got \{1: 2\}$"
    ):
        Foreign(anything={1: 2}).to_dict()


def test_a_class_that_nobody_announced():
    said = r"^policy: expected a class with an entry point in 'vlmprune\.policies', got Foreign$"
    with pytest.raises(InputError, match=said):
        Stages([Foreign()]).to_dict()


def test_functions_that_cannot_be_imported(monkeypatch):
    def local(ctx):
        return ctx.ordinals

    script = type(local)(keep_all.__code__, {}, "keep_all")
    script.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "keep_all", script, raising=False)
    for function in (local, lambda ctx: ctx, partial(keep_all), Methods().method, script):
        for policy, name in ((Custom(2, function), "select"), (CDPruner(relevance=function), "relevance")):
            said = f"^{name}: expected data, or a function that can be imported by its name, got "
            with pytest.raises(InputError, match=said):
                policy.to_dict()


@pytest.mark.parametrize(
    "text, policy",
    [
        (
            "divprune:keep=0.5 + random_deep:layer=20,keep=0.25",
            Stages([DivPrune(keep=0.5), RandomDeep(layer=20, keep=0.25)]),
        ),
        (
            "fastv:layer=2,keep=0.3 | uniform:layer=2,stride=3",
            FastV(layer=2, keep=0.3) | Uniform(layer=2, stride=3),
        ),
        ("fastv&uniform", FastV() & Uniform()),
        ("fastv | uniform & random", FastV() | Uniform() & Random()),
        ("(fastv | uniform) & random", (FastV() | Uniform()) & Random()),
        ("fastv | uniform | random", FastV() | Uniform() | Random()),
        ("divprune + fastv + random:layer=3", Stages([DivPrune(), FastV(), Random(3)])),
        ("divprune + (fastv + random:layer=3)", Stages([DivPrune(), Stages([FastV(), Random(3)])])),
        (
            "divprune + fastv & divprune + random",
            Stages([DivPrune(), FastV()]) & Stages([DivPrune(), Random()]),
        ),
        ("divprune+(fastv|random)", Stages([DivPrune(), FastV() | Random()])),
        ("((fastv))", FastV()),
        (" fastv : layer = 3 , keep = 0.25 ", FastV(3, 0.25)),
        ("divprune\n+ fastv", Stages([DivPrune(), FastV()])),
        (
            "divprune:earlier_kv=compact + fastv:earlier_kv=compact",
            Stages([DivPrune(earlier_kv="compact"), FastV(earlier_kv="compact")], earlier_kv="compact"),
        ),
        (
            "fastv:earlier_kv=compact | uniform:earlier_kv=compact",
            FastV(earlier_kv="compact") | Uniform(earlier_kv="compact"),
        ),
        (
            "divprune:rectify=true + (fastv:rectify=true & random:rectify=true)",
            Stages(
                [DivPrune(rectify=True), FastV(rectify=True) & Random(rectify=True)],
                rectify=True,
            ),
        ),
        ("fastv:rectify=false | random", FastV() | Random()),
        ("without_sinks:method=fastv", WithoutSinks(FastV())),
        (
            "divprune + without_sinks:method=(fastv:layer=3,keep=64),tau=12.5,dimensions=1415/2533",
            Stages([DivPrune(), WithoutSinks(FastV(3, 64), 12.5, (1415, 2533))]),
        ),
        (f"custom:layer=2,select={__name__}:keep_all", Custom(2, keep_all)),
    ],
)
def test_text(text, policy):
    assert policy_from(text) == policy
    assert type(policy_from(text)) is type(policy)


def test_what_stands_in_the_docstring_of_random_deep():
    """The paper's recipe."""
    text = "divprune:keep=0.5 + random_deep:layer=20,keep=0.25"
    check_policy(policy_from(text))


FASTV = {"policy": "fastv"}
A_DICT = r"^policy: expected a dict with a name under 'policy', a text or a YAML file, got "


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "fastv uniform",
            r"^policy: expected one of fastv, .*, got 'fastv uniform' \(did you mean 'uniform'\?\)$",
        ),
        ("fastv +", r"^policy: expected one of fastv, .*, got ''$"),
        ("| fastv", r"^policy: expected one of fastv, .*, got ''$"),
        ("(fastv", r"^policy: expected a closing parenthesis, got ''$"),
        ("(fastv uniform(", r"^policy: expected a closing parenthesis, got '\('$"),
        (
            "fastv) + random",
            r"^policy: expected \+, & or \| between two policies, got '\)' in 'fastv\) \+ random'$",
        ),
        ("fastv (random)", r"^policy: expected \+, & or \| between two policies, got '\(' in "),
        ("fastv + random", r"^policies: expected one policy per layer, got FastV"),
        ("fastv | random:layer=3", r"^second: expected a policy with the layers \(2,\), got \(3,\)$"),
        (
            "fastv:rectify=true + random:layer=3",
            r"^policies: expected rectify=False as Stages itself has it, got FastV",
        ),
        (
            "fastv:earlier_kv=compact | random",
            r"^first: expected earlier_kv='full' as Union itself has it, got ",
        ),
        ("fastv:policy=random", r"^policy fastv: expected each field once, got policy twice$"),
        ({}, A_DICT + r"\{\}$"),
        ([FASTV], A_DICT + r"\["),
        (None, A_DICT + "None$"),
        (3, A_DICT + "3$"),
        ({"policy": 3}, A_DICT + r"\{'policy': 3\}$"),
        (
            {"policy": "fastvv"},
            r"^policy: expected one of fastv, .*, got 'fastvv' \(did you mean 'fastv'\?\)$",
        ),
        (
            FASTV | {"layr": 2},
            r"^policy fastv: expected one of the fields layer, keep, rows, spend, earlier_kv, rectify, got 'layr' \(did you mean 'layer'\?\)$",
        ),
        (FASTV | {3: 2}, r"^policy fastv: expected one of the fields .*, got 3$"),
        (FASTV | {"layer": 2.0}, r"^layer: expected int, got 2\.0$"),
        (FASTV | {"layer": "2"}, r"^layer: expected int, got '2'$"),
        (FASTV | {"layer": True}, r"^layer: expected int, got True$"),
        (FASTV | {"keep": "half"}, r"^keep: expected int or float, got 'half'$"),
        (FASTV | {"keep": None}, r"^keep: expected int or float, got None$"),
        (FASTV | {"keep": [0.5]}, r"^keep: expected int or float, got \[0\.5\]$"),
        (FASTV | {"keep": 1.5}, r"^keep: expected a share in \(0, 1\] .*, got 1\.5$"),
        (FASTV | {"rows": "all"}, r"^rows: expected 'last' or 'mean', got 'all'$"),
        (
            {"policy": "feather", "keep": 1},
            r"^keep: expected a share in \(0, 1\] as a float \(1.0 is everything\), got 1$",
        ),
        ({"policy": "feather", "layers": 8}, r"^layers: expected int/int, got 8$"),
        ({"policy": "feather", "layers": [8, None]}, r"^layers: expected int/int, got \[8, None\]$"),
        ({"policy": "feather", "layers": [8, 16, 24]}, r"^layers: expected int/int, got \[8, 16, 24\]$"),
        ({"policy": "pyramiddrop", "ratio": "0.5"}, r"^ratio: expected float or float/\.\.\., got '0\.5'$"),
        ({"policy": "visionzip", "count_cls": 1}, r"^count_cls: expected true or false, got 1$"),
        (
            {"policy": "sparsevlm", "version": 1.5},
            r"^version: expected '1\.5' or '1\.0' or 'paper', got 1\.5 \(did you mean '1\.5'\?\)$",
        ),
        ({"policy": "stages"}, r"^policy stages: expected a value for policies, got none$"),
        ({"policy": "stages", "policies": []}, r"^policies: expected at least one policy, got none$"),
        ({"policy": "stages", "policies": FASTV}, r"^policies: expected a list of PruningPolicy, got \{"),
        ({"policy": "stages", "policies": [FASTV, 3]}, A_DICT + "3$"),
        ({"policy": "stages", "policies": [FASTV | {"layer": "x"}]}, r"^layer: expected int, got 'x'$"),
        ({"policy": "union", "first": FASTV}, r"^policy union: expected a value for second, got none$"),
        ({"policy": "union", "first": FASTV, "second": {"layer": 2}}, A_DICT + r"\{'layer': 2\}$"),
        (
            {"policy": "custom", "layer": 2},
            r"^select: expected a callable that takes a TokenContext, got None$",
        ),
        (
            {"policy": "custom", "layer": 2, "select": "keep_all"},
            r"^select: expected a function as package\.module:name, got 'keep_all'$",
        ),
        (
            {"policy": "custom", "layer": 2, "select": "nowhere:keep"},
            r"^select: expected a function that can be imported, got 'nowhere:keep': ModuleNotFoundError: ",
        ),
        (
            {"policy": "custom", "layer": 2, "select": "math:pi.real"},
            r"^select: expected a callable that takes a TokenContext, got 3\.14",
        ),
        (
            {"policy": "cdpruner", "relevance": "texts"},
            r"^relevance: expected 'text' or 'none' or a function as package\.module:name, got 'texts' \(did you mean 'text'\?\)$",
        ),
        (Path("recipe.txt"), r"^policy: expected a YAML file, got 'recipe\.txt': .*No such file"),
        ("nowhere.yml", r"^policy: expected a YAML file, got 'nowhere\.yml': .*No such file"),
    ],
)
def test_errors(source, message):
    with pytest.raises(InputError, match=message):
        policy_from(source)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"policy: [", r"^policy: expected a YAML file, got '.*recipe\.yaml': while parsing"),
        (b"\xff\xfe\xfa", r"^policy: expected a YAML file, got '.*recipe\.yaml': .*decode"),
        (
            b"!!python/name:os.system x",
            r"^policy: expected a YAML file, got '.*': could not determine a constructor",
        ),
        (b"", A_DICT + "None$"),
        (b"fastv", A_DICT + "'fastv'$"),
    ],
)
def test_files_that_are_no_recipes(content, message, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        policy_from(tmp_path / "recipe.yaml")


def test_pairs_are_made_of_classes_of_their_own():
    assert (Union, Intersection) == (registry.policy_class("union"), registry.policy_class("intersection"))


@pytest.mark.parametrize(
    "policy, name",
    [
        (FastV(), "FastV()"),
        (FastV(layer=3, keep=0.25, earlier_kv="compact"), "FastV(earlier_kv='compact', layer=3, keep=0.25)"),
        (Scout(coarse=DivPrune(keep=48), look=6), "Scout(coarse=DivPrune(keep=48), look=6)"),
        (Stages([DivPrune(keep=48), FastV(layer=4)]), "Stages(policies=(DivPrune(keep=48), FastV(layer=4)))"),
    ],
)
def test_what_tables_call_an_object(policy, name):
    assert str(policy) == name and [*named([policy])] == [name]


@pytest.mark.parametrize("policy", [MMTok(alpha=1), SCOPE(alpha=0), GreedyPrune(tau=1)])
def test_a_whole_number_in_place_of_a_float_is_typed_as_one(policy):
    text = to_text(policy)
    assert text.endswith((".0",)) and policy_from(text) == policy
