"""Every policy says what earlier layers hold in the KV cache; of a combination its own setting counts."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

import vlmprune
from helpers.methods import typed, usual
from vlmprune import Custom, FastV, Random, Stages
from vlmprune.policies import policy_from
from vlmprune.policies.registry import BUILT_IN


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_policy_has_it(name):
    plain = policy_from(typed(name))
    assert plain.earlier_kv == "full"
    policy = policy_from(f"{typed(name)}{',' if ':' in typed(name) else ':'}earlier_kv=compact")
    assert policy.earlier_kv == "compact" and policy != plain
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert dataclasses.replace(policy, earlier_kv="full") == plain
    with pytest.raises(ValueError, match=r"^earlier_kv: expected 'full' or 'compact', got 'less'$"):
        usual(name, earlier_kv="less")


def test_the_spec_names_the_words():
    with pytest.raises(ValueError, match=r"^earlier_kv: expected 'full' or 'compact', got 'less'$"):
        policy_from("fastv:earlier_kv=less")


def test_a_function_has_it_too():
    assert Custom(1, lambda ctx: None, earlier_kv="compact").earlier_kv == "compact"
    with pytest.raises(ValueError, match=r"^earlier_kv: "):
        Custom(1, lambda ctx: None, earlier_kv="less")


def test_the_setting_of_the_whole_counts():
    compact, full = FastV(layer=2, earlier_kv="compact"), Random(layer=2)
    assert (compact | dataclasses.replace(full, earlier_kv="compact")).earlier_kv == "compact"
    assert (FastV(layer=2) & full).earlier_kv == "full"
    assert Stages([FastV(layer=2), Random(layer=3)], earlier_kv="compact").earlier_kv == "compact"
    assert Stages([compact], earlier_kv="compact").earlier_kv == "compact"
    with pytest.raises(
        ValueError, match=r"^policies: expected earlier_kv='full' as Stages itself has it, got FastV"
    ):
        Stages([compact])
    for mixed in (lambda: compact | full, lambda: full & compact):
        with pytest.raises(
            ValueError, match=r"^(first|second): expected earlier_kv='full' as (Union|Intersection) "
        ):
            mixed()
    assert vlmprune.Union(FastV(layer=2), full, earlier_kv="compact").earlier_kv == "compact"
