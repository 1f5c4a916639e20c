"""Reads a policy's setting from text, by the type the field is annotated with. ``spell_type`` names that type."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from vlmprune.errors import InputError, check

WORDS: Mapping[Any, Mapping[str, Any]] = {
    bool: {"true": True, "false": False},
    types.NoneType: {"none": None},
}


def read_setting(text: str, hint: Any, name: str) -> Any:
    """Read ``text`` as ``hint``: int, float, str, bool, Literal, None, a tuple of these ("/" between) or a union.

    Of a union the first member that fits wins, in the order of writing: under ``int | float``, "64" is an int. Where
    only a float fits, "1" is refused: ``keep=1`` is one token, and never everything.

    Raises:
        InputError: the text does not fit; names the setting and the type.
    """
    for kind in _members(hint):
        try:
            return _read(text, kind)
        except ValueError:
            continue
    wanted = spell_type(hint)
    whole = "float" in wanted and "int" not in wanted and any(map(str.isdecimal, text.split("/")))
    point = " (with a decimal point, as in 1.0)" if whole else ""
    raise InputError(f"{name}: expected {wanted}{point}, got {text!r}")


def spell_type(hint: Any) -> str:
    """How a type is written in messages: "int or float", "'last' or 'mean'", "int/int"."""
    return " or ".join(_spell(kind) for kind in _members(hint))


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _read(text: str, kind: Any) -> Any:
    """Read ``text`` as one type that is no union. Raises InputError if it does not fit."""
    origin = typing.get_origin(kind)
    if kind in WORDS or origin is Literal:
        words = WORDS[kind] if kind in WORDS else {str(word): word for word in typing.get_args(kind)}
        check(text in words, "value", " or ".join(words), text)
        return words[text]
    if origin is tuple:
        parts = text.split("/")
        kinds = _entries(kind, len(parts))
        check(len(kinds) == len(parts), "value", f"{len(kinds)} entries", len(parts))
        return tuple(read_setting(part, k, "entry") for part, k in zip(parts, kinds, strict=True))
    check(kind in (int, float, str), "field", "a type that can be read from text", kind)
    check(kind is not float or not text.isdecimal(), "value", "a decimal point", text)
    return kind(text)


def _entries(kind: Any, count: int) -> tuple[Any, ...]:
    """The types of a tuple's entries; ``tuple[X, ...]`` has as many as there are."""
    args = typing.get_args(kind)
    return args[:1] * count if args[-1:] == (...,) else args


def _spell(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return "/".join("..." if a is ... else _spell(a) for a in args)
    if kind is bool:
        return "true or false"
    return "none" if kind is types.NoneType else getattr(kind, "__name__", str(kind))
