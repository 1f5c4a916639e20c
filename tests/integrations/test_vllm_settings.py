"""What vLLM can be asked to prune by: every policy is served or refused with its reason, and counts are known ahead. No vLLM."""

import logging
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.methods import usual
from helpers.scorers import SLOPE, glance
from vlmprune.errors import InputError
from vlmprune.integrations import vllm as plugin
from vlmprune.integrations.vllm.settings import (
    MOST,
    Settings,
    check_image_only,
    check_vision_layers,
    warn_packed,
)
from vlmprune.policies import (
    Custom,
    DivPrune,
    FasterVLM,
    Folder,
    Intersection,
    Learned,
    Needs,
    PruningPolicy,
    PyramidDrop,
    Random,
    Reduction,
    SparseVLM,
    Stages,
    Uniform,
    Union,
    VisionZip,
    VisPruner,
    WithoutSinks,
)
from vlmprune.policies.registry import BUILT_IN, OURS
from vlmprune.testing.context import make_context

SERVED = "served"
INSIDE = "layer 0 alone"
TEXT = "got one that reads the prompt"
COUNT = "a count known before an image is encoded"
SIZES = (16, 196, 576, 2880)


def first(ctx):
    return torch.zeros(len(ctx.counts), 1, dtype=torch.int64)


@dataclass(frozen=True)
class Foreign(PruningPolicy):
    """Of another package: keeps the first tokens, an even number of them."""

    layers = (0,)
    keep: int | float = 4
    held: dict = field(default_factory=dict)

    def select(self, ctx):
        return torch.arange(self.kept(ctx.counts[0], 1, 0)).expand(len(ctx.counts), -1)

    def kept(self, tokens, images, layer):
        return super().kept(tokens, images, layer) // 2 * 2

    def __hash__(self):
        return hash(self.keep)


@dataclass(frozen=True)
class Writes(Foreign):
    """Adds to the prompt."""

    inserts = True


@dataclass(frozen=True)
class Unhashable(Foreign):
    """Holds what cannot be compared."""

    def __hash__(self):
        return hash(self.held)


@dataclass(frozen=True)
class ByAttention(Foreign):
    """Asks for what no one has before the language model."""

    def needs(self, layer):
        return Needs(attention="own")


BY_NAME = {
    "fastv": INSIDE,
    "feather": INSIDE,
    "pyramiddrop": INSIDE,
    "sparsevlm": INSIDE,
    "sparsevlm_plus": INSIDE,
    "dart": INSIDE,
    "knorm": INSIDE,
    "greedyprune": INSIDE,
    "v2drop": INSIDE,
    "priortr": INSIDE,
    "fitprune": INSIDE,
    "mustdrop": INSIDE,
    "ficoco": INSIDE,
    "vscan": INSIDE,
    "star": INSIDE,
    "vtw": INSIDE,
    "lvlm_csp": INSIDE,
    "fastervlm": SERVED,
    "visionzip": SERVED,
    "vispruner": SERVED,
    "folder": SERVED,
    "aim": INSIDE,
    "divprune": SERVED,
    "cdpruner": TEXT,
    "scope": SERVED,
    "mmtok": TEXT,
    "prunesid": SERVED,
    "zoo_prune": SERVED,
    "agilepruner": SERVED,
    "prumerge": SERVED,
    "trim": TEXT,
    "flowcut": SERVED,
    "tome": SERVED,
    "visiontrim": TEXT,
    "hired": SERVED,
    "globalcom2": SERVED,
    "holov": SERVED,
    "hiprune": SERVED,
    "evs": SERVED,
    "vidcom2": SERVED,
    "dycoke": SERVED,
    "fastvid": SERVED,
    "flashvid": INSIDE,
    "prunevid": INSIDE,
    "holitom": INSIDE,
    "accm_selection": TEXT,
    "accm": TEXT,
    "learned": INSIDE,
    "sgl": INSIDE,
    "scout": INSIDE,
    "random_deep": INSIDE,
    "random": INSIDE,
    "uniform": INSIDE,
}
"""Every method as it comes, with what cannot be left out."""

OTHERWISE = [
    (usual("dart", layer=0), TEXT),
    (usual("cdpruner", relevance="none"), SERVED),
    (usual("accm_selection", relevance="none"), SERVED),
    (usual("prumerge", adaptive=True), COUNT),
    (usual("visiontrim", text_ratio=0.0), SERVED),
    (Learned(SLOPE, layer=0, keep=0.3), SERVED),
    (Learned(SLOPE, layer=0, keep=0.3, threshold=0.5), COUNT),
    (Learned(glance(8), layer=0), TEXT),
    (usual("sgl", layer=0), SERVED),
    (Random(layer=0), SERVED),
    (usual("random_deep", layer=0), SERVED),
    (Uniform(layer=0), SERVED),
    (Uniform(layer=0, stride=2), COUNT),
    (usual("pyramiddrop", layers=(0,), ratio=0.5), "attention"),
    (FasterVLM(rectify=True), "rectify: expected False"),
    (Stages([VisionZip()]), SERVED),
    (Stages([VisionZip(), Random(layer=4)]), INSIDE),
    (Union(Random(layer=0), Uniform(layer=0)), COUNT),
    (Intersection(Random(layer=0), Uniform(layer=0)), COUNT),
    (WithoutSinks(FasterVLM()), SERVED),
    (WithoutSinks(Random(layer=2)), INSIDE),
    (Custom(0, first), COUNT),
    (Custom(2, first), INSIDE),
    (Foreign(), SERVED),
    (Writes(), "got one that writes into the prompt"),
    (Unhashable(), "settings that hash"),
    (ByAttention(), "got one by the language model's attention"),
]
WORKING = [
    *[usual(name) for name, said in BY_NAME.items() if said == SERVED],
    *[policy for policy, said in OTHERWISE if said == SERVED and not isinstance(policy, Foreign)],
    VisionZip(tokens=192, count_cls=True),
    VisionZip(dominant=3, contextual=0),
    VisionZip(dominant=0.3, contextual=0.1),
    VisPruner(keep=5, important_ratio=0.0),
    VisPruner(keep=0.2, important_ratio=1.0),
    Folder(keep=0.3, place="projected"),
    DivPrune(keep=0.098, spend="crop"),
]


def test_every_method_is_here():
    assert BY_NAME.keys() == BUILT_IN.keys()
    made = {type(policy) for policy, _ in OTHERWISE}
    assert made >= {OURS[name] for name in OURS.keys() - BUILT_IN.keys()}


@pytest.mark.parametrize(
    ("policy", "said"),
    [*((usual(name), said) for name, said in BY_NAME.items()), *OTHERWISE],
    ids=lambda value: repr(value)[:60],
)
def test_served_or_refused_with_the_reason(policy, said):
    if said == SERVED:
        check_image_only(policy)
        return
    with pytest.raises(InputError, match=r": expected .*, got ") as caught:
        Settings(policy)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", OURS)
def test_no_policy_has_a_setting_of_our_name(name):
    assert "max_keep" not in OURS[name].__dataclass_fields__


# Counts


@pytest.mark.parametrize("policy", WORKING, ids=repr)
@pytest.mark.parametrize("tokens", SIZES)
def test_every_count_can_be_asked_for(policy, tokens):
    settings = Settings(policy, max_keep=1.0)
    for wanted in range(1, tokens + 1, 1 if tokens < 1000 else 13):
        assert settings.kept(tokens, wanted) == wanted
        assert settings.policy_for(tokens, wanted).kept(tokens, 1, 0) == wanted


def chosen(policy, grid, layer=0):
    ctx = make_context(policy.needs(layer), [[grid]], layer)
    choice = policy.select(ctx)
    return (choice.index if isinstance(choice, Reduction) else choice).shape[1]


@pytest.mark.parametrize("policy", WORKING, ids=repr)
def test_where_the_count_is_fixed_a_choice_keeps_it(policy):
    assert policy.fixed_count
    for rows, columns in ((4, 5), (1, 7), (6, 6)):
        n = rows * columns
        for budget in (1, 2, n // 3, n - 1, n):
            one = Settings(policy).policy_for(n, budget)
            assert chosen(one, (rows, columns)) == one.kept(n, 1, 0) == budget
        for share in (0.01, 0.098, 0.5, 0.999, 1.0):
            one = policy.at(share)
            assert chosen(one, (rows, columns)) == one.kept(n, 1, 0)


COUNTED_LATER = [
    (Uniform(layer=0, stride=2), (3, 7)),
    (Union(Random(layer=0), Random(layer=0)), (4, 5)),
    (Intersection(Random(layer=0), Random(layer=0)), (4, 5)),
    (usual("feather", layers=(1, 4)), (4, 5)),
]


@pytest.mark.parametrize(("policy", "grid"), COUNTED_LATER, ids=repr)
def test_where_the_count_is_not_fixed_a_choice_may_keep_another(policy, grid):
    assert not policy.fixed_count
    layer = policy.layers[0]
    assert chosen(policy, grid, layer) != policy.kept(grid[0] * grid[1], 1, layer)


UNTOLD = [
    Custom(0, first),
    Learned(SLOPE, layer=0, threshold=0.5),
    SparseVLM(layers=(3,), version="1.0", tokens=64),
    SparseVLM(layers=(3,), version="paper", scale=0.7),
]


@pytest.mark.parametrize("policy", UNTOLD, ids=repr)
def test_where_the_count_is_unknown_it_is_not_told(policy):
    assert not policy.fixed_count
    with pytest.raises(InputError):
        policy.kept(20, 1, policy.layers[0])


def test_a_later_share_of_the_whole_image_may_be_off_by_one():
    """PyramidDrop with a tuple: of what an earlier stage left nobody tells how many there were."""
    policy = PyramidDrop(layers=(2, 4), ratio=(0.5, 0.2))
    off = set()
    for n in range(20, 40):
        left = policy.kept(n, 1, 2)
        ctx = make_context(policy.needs(4), [[(1, n)]], 4, kept=[range(left)])
        off.add(policy.rank(ctx).keep[0] - policy.kept(left, 1, 4))
    assert off - {0} and off <= {-1, 0, 1}
    assert not policy.fixed_count
    assert PyramidDrop(layers=(2, 4), ratio=0.5).fixed_count


# Budgets of requests


@pytest.mark.parametrize(
    "asked", [0, -3, True, "64", 64.0, 1.5, 0.0, float("nan"), float("inf"), [64], (), {"a": 1}, np.zeros(2)]
)
def test_no_budget(asked):
    said = r"^vlmprune_keep: expected a share in \(0, 1\] or a whole number of tokens per image >= 1( \(or 'max'\))?, got "
    with pytest.raises(InputError, match=said):
        Settings(DivPrune(keep=64), max_keep=128).kept(576, asked)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (65, r"at most 64 of this image's 576 tokens \(more only with a larger max_keep\), got 65"),
        (0.5, r"at most 64 of this image's 576 tokens \(more only with a larger max_keep\), got 0.5"),
        (577, "at most the 576 tokens of this image, got 577"),
        (10**30, f"at most the 576 tokens of this image, got {10**30}"),
    ],
)
def test_too_large_a_budget(asked, said):
    with pytest.raises(InputError, match=f"^vlmprune_keep: expected {said}$"):
        Settings(DivPrune(keep=64)).kept(576, asked)


def test_a_share_is_counted_as_the_policy_counts_it():
    """DivPrune rounds to the nearest count, others down."""
    for policy, kept in ((DivPrune(keep=0.1), 20), (FasterVLM(keep=0.1), 19)):
        settings = Settings(policy)
        assert settings.kept(196) == settings.kept(196, 0.1) == settings.most(196) == kept


@pytest.mark.parametrize("asked", [np.int64(32), np.float64(0.0556), np.array(32), 32])
def test_numbers_of_numpy_are_numbers(asked):
    assert Settings(DivPrune(keep=64)).kept(576, asked) == 32


def test_the_largest_budget():
    settings = Settings(DivPrune(keep=64), max_keep=128)
    assert [settings.kept(576), settings.most(576), settings.kept(576, MOST), settings.kept(576, 128)] == [
        64,
        128,
        128,
        128,
    ]
    assert [settings.kept(50), settings.most(50), settings.kept(100, MOST)] == [50, 50, 100]
    share = Settings(DivPrune(keep=64), max_keep=0.25)
    assert [share.most(576), share.most(100)] == [144, 64]  # never less than without asking


def test_what_a_foreign_policy_cannot_keep_is_refused_in_the_request():
    """Its worker would end the engine."""
    settings = Settings(Foreign(keep=6))
    assert [settings.kept(20), settings.kept(20, 4)] == [6, 4]
    with pytest.raises(
        InputError, match=r"^vlmprune_keep: expected a count that Foreign\(.*\) can keep .* 20 tokens, got 5"
    ):
        settings.kept(20, 5)
    with pytest.raises(InputError, match=r"expected to keep some of an image's 1 tokens, got 0"):
        settings.kept(1)


# The configuration


def config(given, family="llava"):
    return SimpleNamespace(model_type=family, vlmprune=given)


def test_a_configuration_is_read():
    given = {"policy": "divprune", "keep": 64, "positions": "pack", "max_keep": 100}
    assert Settings.of(config(given)) == Settings(DivPrune(keep=64, positions="pack"), 100)
    assert given["max_keep"] == 100
    kept = {"policy": "divprune", "keep": 64}
    assert Settings.of(config(kept, "qwen2_5_vl")).policy == DivPrune(keep=64, positions="keep")
    assert Settings.of(config({"policy": "uniform", "layer": 0})).policy == Uniform(layer=0)


@pytest.mark.parametrize("given", [None, "divprune", {}, {"keep": 3}, ["divprune"], 3])
def test_no_policy(given):
    with pytest.raises(
        InputError, match=r"^hf_overrides\['vlmprune'\]: expected a dict as in {\"policy\": .*, got "
    ):
        Settings.of(config(given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"policy": "divprun"}, "policy: expected one of fastv, .*, got 'divprun'"),
        ({"policy": "divprune", "kep": 3}, "policy divprune: expected one of the fields keep, .*, got 'kep'"),
        ({"policy": "divprune", "keep": 128.0}, "keep: expected a share .* or a whole number .*, got 128.0"),
        ({"policy": "divprune", "keep": "128"}, "keep: expected int or float, got '128'"),
        ({"policy": "divprune", "keep": True}, "keep: expected .*, got True"),
        ({"policy": "divprune", "keep": 0}, "keep: expected .*, got 0"),
        ({"policy": "divprune", "keep": float("nan")}, "keep: expected .*, got nan"),
        ({"policy": "divprune", "max_keep": 128.0}, "max_keep: expected .*, got 128.0"),
        ({"policy": "divprune", "max_keep": "all"}, "max_keep: expected .*, got 'all'"),
        ({"policy": "divprune", "max_keep": False}, "max_keep: expected .*, got False"),
        ({"policy": "divprune", "positions": "keep"}, "positions: expected 'pack' with .*, got 'keep'"),
        ({"policy": "divprune"}, "positions: expected 'pack' with .*, got 'keep' in DivPrune"),
        (
            {"policy": "without_sinks", "method": {"policy": "fastervlm"}},
            "positions: expected 'pack' with .*, got 'keep' in WithoutSinks",
        ),
    ],
    ids=repr,
)
def test_settings_that_are_refused(given, said):
    with pytest.raises(InputError, match=f"^{said}"):
        Settings.of(config(given))


def test_positions_and_families():
    packed = {"policy": "divprune", "positions": "pack"}
    with pytest.raises(
        InputError, match=r"^positions: expected 'keep' with this model in vLLM, .*, got 'pack'"
    ):
        Settings.of(config(packed, "qwen3_vl"))
    nested = {"policy": "stages", "policies": [{"policy": "visionzip", "positions": "pack"}]}
    assert Settings.of(config(nested)).policy == Stages([VisionZip(positions="pack")])
    with pytest.raises(InputError, match=r"^positions: expected 'keep' .*, got 'pack' in Stages"):
        Settings.of(config(nested, "qwen3_vl"))
    with pytest.raises(InputError, match=r"^model_type: expected one of llava, .*, got 'internvl'$"):
        Settings.of(config(packed, "internvl"))


def test_what_has_no_setting_for_positions_is_served_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        for policy in (Uniform(layer=0), WithoutSinks(Random(layer=0))):
            warn_packed(policy)
        warn_packed(Stages([VisionZip(positions="pack")]))  # it says so itself
    assert [said.split(" keeps stands at 0, 1, 2")[0] for said in caplog.messages] == [
        f"vlmprune: what {Uniform(layer=0)!r}",
        f"vlmprune: what {WithoutSinks(Random(layer=0))!r}",
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            Settings(DivPrune(keep=577)),
            "vlmprune: expected at most the 576 tokens of .*, got 577 with DivPrune",
        ),
        (Settings(VisionZip(dominant=570, contextual=10)), "vlmprune: .* 576 .*, got 580 with VisionZip"),
        (Settings(DivPrune(keep=64), 63), "max_keep: expected 64 .* to 576, .*, got 63"),
        (Settings(DivPrune(keep=64), 577), "max_keep: expected 64 .* to 576, .*, got 577"),
        (Settings(DivPrune(keep=64), 0.1), "max_keep: expected 64 .* to 576, .*, got 0.1"),
        (Settings(DivPrune(keep=0.5), 200), "max_keep: expected 288 .* to 576, .*, got 200"),
    ],
)
def test_room(settings, said):
    with pytest.raises(InputError, match=f"^{said}"):
        settings.check_room(576)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(DivPrune(keep=576)),
        Settings(DivPrune(keep=1.0)),
        Settings(DivPrune(keep=1e-9)),
        Settings(DivPrune(keep=64), 64),
        Settings(DivPrune(keep=64), 1.0),
        Settings(VisionZip(tokens=64), 576),
        Settings(VisionZip(dominant=0.3, contextual=0.1), 0.4),
    ],
)
def test_enough_room(settings):
    settings.check_room(576)


def test_vision_layers():
    for layer in (-24, -2, 0, 22):
        check_vision_layers(FasterVLM(vision_layer=layer), depth=24, loaded=23)
    check_vision_layers(DivPrune(), depth=24, loaded=0)
    said = r"^vision_layer: expected -24 to -2, or 0 to 22 \(of 24 layers vLLM loads 23\), got "
    for layer in (-25, -1, 23, 24, 99):
        with pytest.raises(InputError, match=f"{said}{layer}$"):
            check_vision_layers(FasterVLM(vision_layer=layer), depth=24, loaded=23)


# Another vLLM


def test_a_vllm_without_the_places_is_left_alone(monkeypatch, caplog):
    old = ModuleType("vllm")
    old.__version__ = "0.1.7"
    monkeypatch.setitem(sys.modules, "vllm", old)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    (said,) = caplog.messages
    assert "expected vLLM 0.32, got 0.1.7" in said
