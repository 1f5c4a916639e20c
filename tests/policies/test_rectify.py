"""Every policy says whether kept tokens stand for the dropped ones; of a combination its own setting counts."""

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
    assert plain.rectify is False
    policy = policy_from(f"{typed(name)}{',' if ':' in typed(name) else ':'}rectify=true")
    assert policy.rectify is True and policy != plain and repr(policy) != repr(plain)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert dataclasses.replace(policy, rectify=False) == plain
    with pytest.raises(ValueError, match=r"^rectify: expected True or False, got 1$"):
        usual(name, rectify=1)


def test_the_setting_of_the_whole_counts():
    on, off = FastV(layer=2, rectify=True), Random(layer=2)
    assert (on | dataclasses.replace(off, rectify=True)).rectify
    assert not (FastV(layer=2) & off).rectify
    assert Stages([FastV(layer=2), Random(layer=3)], rectify=True).rectify
    assert vlmprune.Union(FastV(layer=2), off, rectify=True).rectify
    assert Custom(1, lambda ctx: None, rectify=True).rectify
    with pytest.raises(
        ValueError, match=r"^policies: expected rectify=False as Stages itself has it, got FastV"
    ):
        Stages([on])
    for join in (FastV.__or__, FastV.__and__):
        with pytest.raises(
            ValueError, match=r"^first: expected rectify=False as (Union|Intersection) itself"
        ):
            join(on, off)
