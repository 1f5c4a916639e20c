"""A method set for one model and one budget."""

from dataclasses import dataclass

import pytest

from vlmprune import FastV, Feather, Scout
from vlmprune.errors import InputError
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.recipe import policy_from, to_text
from vlmprune.policies.registry import BUILT_IN, OURS, fields_of
from vlmprune.view.fitting import Size, fit, mean_of, to_depth

SMALL, LLAVA = Size(layers=8, tower=4, visual=576), Size(layers=32, tower=24, visual=576)
AS_SET = {"accm", "learned", "sgl"}
METHODS = [name for name in BUILT_IN if name not in AS_SET | {"vtw"}]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [SMALL, LLAVA], ids=["8 layers", "32 layers"])
def test_the_mean_is_the_budget_or_is_said_not_to_be(name, size):
    for budget in (192, 64):
        found = fit(name, budget, size)
        assert policy_from(found.text) == found.policy
        assert found.policy.layers[-1] < size.layers
        if found.meets:  # the largest share that does: one token more is at most a token more of the mean
            assert budget - 3 <= found.mean <= budget
        else:  # no share at all would
            assert found.mean >= mean_of(found.policy.at(1e-9), size) > budget


def test_before_the_model_every_budget_is_met_exactly():
    for name in ("divprune", "fastervlm", "cdpruner", "uniform"):
        assert [fit(name, budget, SMALL).mean for budget in (192, 128, 64)] == [192, 128, 64]


def test_published_presets_come_back_at_their_own_depth():
    """At 32 layers and 576 tokens the share keeps what the preset's number of tokens does."""
    assert fit("fastv", 192, LLAVA).policy.kept(576, 1, 2) == 166
    assert fit("fastv", 64, LLAVA).policy.kept(576, 1, 2) == 29  # the preset's 30 are a mean of 64.1
    assert fit("feather", 192, LLAVA).policy == Feather(keep=0.22)


def test_what_first_layers_alone_exceed_keeps_as_many_at_last():
    found = fit("fastv", 64, SMALL)  # one whole layer of eight is a mean of 72
    assert not found.meets
    assert found.policy.kept(576, 1, 1) == 64
    assert found.mean == (576 + 7 * 64) / 8


def test_where_it_cannot_be_met_a_smaller_budget_still_costs_less():
    """Behind the layers that see every token the mean is the budget."""
    found = [fit("feather", budget, SMALL) for budget in (144, 128, 100, 64, 30)]
    assert not any(one.meets for one in found)
    assert [one.mean for one in found] == sorted((one.mean for one in found), reverse=True)
    for one, budget in zip(found, (144, 128, 100, 64, 30), strict=True):
        behind = (8 * one.mean - 2 * 576) / 6
        assert budget - 2 < behind <= budget


def test_a_budget_below_what_a_method_has_to_keep_is_refused():
    with pytest.raises(InputError, match=r"^Scout: expected a budget of at least 2 visual tokens, got 1$"):
        fit("scout", 1, SMALL)


def test_layers_stand_at_the_same_relative_depth():
    assert to_depth(Feather(), SMALL).layers == (2, 4)
    assert to_depth(FastV(layer=31), SMALL).layers == (7,)
    assert to_depth(Feather(), LLAVA) == Feather()
    assert to_depth(Scout(), SMALL).layers == (0, 5)
    assert fit("vscan", 192, SMALL).policy.shallow_layer == 1


@pytest.mark.parametrize(
    "name, budget, size, message",
    [
        ("nothing", 192, SMALL, "nothing"),
        ("sgl", 192, SMALL, "guide"),
        ("vtw", 192, SMALL, "share"),
        ("divprune", 577, SMALL, "budget: expected visual tokens from 1 to 576, got 577"),
        ("divprune", 0, SMALL, "budget: expected visual tokens from 1 to 576, got 0"),
        ("feather", 192, Size(layers=1, tower=4, visual=576), "layer"),
    ],
)
def test_what_cannot_be_fitted_says_so(name, budget, size, message):
    with pytest.raises(InputError, match=message):
        fit(name, budget, size)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in AS_SET])
def test_a_policy_as_typed_is_the_policy(name):
    usual = policy_from(name)
    assert to_text(usual) == name
    for preset in BUILT_IN[name].presets.values():
        policy = policy_from(f"{name}:{preset}")
        assert policy_from(to_text(policy)) == policy
        told = to_text(policy).partition(":")[2]
        changed = {f for f in fields_of(type(policy)) if getattr(policy, f) != getattr(usual, f)}
        assert {part.partition("=")[0] for part in told.split(",") if part} == changed


def test_policies_among_the_settings_are_typed_in_parentheses():
    policy = policy_from("scout:coarse=(divprune:keep=0.2),look=5")
    assert to_text(policy) == "scout:coarse=(divprune:keep=0.2),look=5"
    assert policy_from(to_text(policy)) == policy


@pytest.mark.parametrize(
    "text",
    [
        "(divprune:keep=0.5) + (fastv:layer=9)",
        "(fastv) | (uniform)",
        "(fastv:keep=0.3) & ((fastv:rows=mean) | (uniform))",
        "(divprune:earlier_kv=compact) + (fastv:layer=9,earlier_kv=compact)",
    ],
)
def test_what_signs_join_is_typed_with_signs(text):
    assert policy_from(to_text(policy_from(text))) == policy_from(text)


@dataclass(frozen=True)
class Named(PruningPolicy):
    """A foreign policy: ``look`` and ``stages`` are no layers here, and it refuses some in its own way."""

    layer: int = 16
    look: bool = True
    stages: int = 3
    note: str = ""
    keep: float = 0.5

    def __post_init__(self):
        if self.layer == 4:
            raise ValueError("not at layer 4\nfor reasons")

    def select(self, ctx):
        return ctx.mask.nonzero()


def test_of_a_foreign_policy_only_layers_are_scaled():
    there = to_depth(Named(), Size(layers=16, tower=4, visual=576))
    assert (there.layer, there.look, there.stages) == (8, True, 3)


def test_a_foreign_refusal_is_told():
    with pytest.raises(InputError, match=r"^Named: not at layer 4$"):
        to_depth(Named(), SMALL)


@pytest.mark.parametrize("note", ["a,b", "a+b", "x.yaml", "a=b|c"])
def test_what_cannot_be_typed_is_refused(note, monkeypatch):
    monkeypatch.setattr("vlmprune.policies.registry.OURS", {**OURS, "named": Named})
    assert to_text(Named(note="plain")) == "named:note=plain"
    with pytest.raises(InputError, match=r"^policy: expected settings that can be typed, got Named"):
        to_text(Named(note=note))
