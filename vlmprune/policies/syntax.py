"""Policies as they are typed: ``divprune:keep=0.5 + random_deep:layer=20,keep=0.25`` becomes the dict that says the same."""

from __future__ import annotations

import re
from functools import reduce
from typing import Any

from vlmprune.errors import check

OPERATORS = (("|", "union"), ("&", "intersection"), ("+", "stages"))
"""What joins two policies, and the policy that it makes; as in Python, ``+`` binds tightest and ``|`` least."""

SIGNS = re.compile(r"([()&|]|(?<![\d.][eE])\+|\+(?!\d))")
"""Operators and parentheses; the plus of ``1e+2`` is none."""


class Word(str):
    """A setting's value as typed; of which type it is, the field says."""


def parse(text: str) -> dict[str, Any]:
    """The dict of a policy written as ``NAME[:field=value,...]``, or of several with ``+``, ``&``, ``|`` and parentheses.

    Its values are ``Word``, and those in parentheses such dicts. Names and fields are not looked up here.

    Raises:
        InputError: a field without a value or given twice, or parentheses and operators that do not match.
    """
    tokens = [token.strip() for token in SIGNS.split(text) if token.strip()]
    found = _joined(tokens, 0)
    check(not tokens, "policy", "+, & or | between two policies", f"{' '.join(tokens[:1])!r} in {text!r}")
    return found


def _joined(tokens: list[str], level: int) -> dict[str, Any]:
    """Take from ``tokens`` what an operator of this level or a tighter one joins."""
    if level == len(OPERATORS):
        return _operand(tokens)
    sign, name = OPERATORS[level]
    parts = [_joined(tokens, level + 1)]
    while tokens[:1] == [sign]:
        del tokens[0]
        parts.append(_joined(tokens, level + 1))
    if len(parts) > 1 and name == "stages":
        return {"policy": name, "policies": parts, **_common(parts)}
    return reduce(lambda a, b: {"policy": name, "first": a, "second": b, **_common([a, b])}, parts)


SHARED = {"earlier_kv": Word("full"), "rectify": Word("false")}
"""The settings of every policy, with their defaults."""


def _common(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """As for ``p | q``: what all say, else the setting that their combination then refuses."""
    said = {setting: {part.get(setting, usual) for part in parts} for setting, usual in SHARED.items()}
    return {setting: min(words) if len(words) == 1 else SHARED[setting] for setting, words in said.items()}


def _operand(tokens: list[str]) -> dict[str, Any]:
    """Take one policy, or what is in parentheses."""
    token = tokens.pop(0) if tokens and tokens[0] not in ("+", "&", "|", ")") else ""
    if token == "(":
        found = _joined(tokens, 0)
        check(tokens[:1] == [")"], "policy", "a closing parenthesis", repr(" ".join(tokens[:1])))
        del tokens[0]
        return found
    name, colon, rest = map(str.strip, token.partition(":"))
    found = {"policy": name}
    while colon:
        for item in rest.split(","):
            field, equals, value = map(str.strip, item.partition("="))
            check(bool(equals), f"policy {name}", "field=value, ...", repr(item))
            check(field not in found, f"policy {name}", "each field once", f"{field} twice")
            found[field] = Word(value)
        if value or tokens[:1] != ["("]:
            break
        found[field] = _operand(tokens)  # a policy in parentheses as a setting
        if not tokens or not tokens[0].startswith(","):
            break
        rest = tokens.pop(0)[1:]
    return found
