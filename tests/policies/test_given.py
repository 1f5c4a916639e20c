"""``TokenContext.given``: what a policy asked for, or what it forgot to declare."""

from __future__ import annotations

from dataclasses import fields

import pytest

from helpers.videos import videos
from vlmprune.policies.base import Needs, TokenContext
from vlmprune.policies.context import ASKED


def test_is_what_was_asked_for():
    ctx = videos([[[(2, 2), (2, 2)]]])
    assert ctx.given("hidden") is ctx.hidden


def test_covers_whatever_may_be_missing():
    """Else a policy that reads it has to find its own words."""
    known = {"ran", "ran_counts", "sizes", "crops", "shares", "words"}  # None says something there
    assert ASKED.keys() == {field.name for field in fields(TokenContext) if field.default is None} - known


@pytest.mark.parametrize("name", ASKED)
def test_says_what_to_declare(name):
    ctx = videos([[[(2, 2), (2, 2)]]])
    ctx = type(ctx)(
        **{field.name: getattr(ctx, field.name) for field in fields(ctx) if field.name not in ASKED}
    )
    declared = {own.name for own in fields(Needs)}
    with pytest.raises(
        ValueError, match=rf"^ctx\.{name}: expected .* \(declare Needs\((\w+)=.*\), got None$"
    ) as seen:
        ctx.given(name)
    said = str(seen.value).split("declare ")[1]
    assert {part.split("=")[0] for part in said.split("Needs(")[1:]} <= declared


def test_refuses_a_name_that_is_none():
    with pytest.raises(
        ValueError, match=r"^name: expected one of .*, got 'hiden' \(did you mean 'hidden'\?\)$"
    ):
        videos([[[(2, 2)]]]).given("hiden")
