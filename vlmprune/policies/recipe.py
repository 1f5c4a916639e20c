"""A policy as plain data: ``policy_from`` reads a dict, a text or a YAML file; ``write`` makes the dict."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from vlmprune.errors import InputError, check, check_known, first_line, nearest
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.custom import Checked
from vlmprune.policies.registry import FAULTS, fields_of, name_of, policy_class
from vlmprune.policies.syntax import OPERATORS, SHARED, Word, parse

UNIONS = (typing.Union, types.UnionType)
WORDS: Mapping[Any, Mapping[str, Any]] = {
    bool: {"true": True, "false": False},
    types.NoneType: {"none": None},
}
SIGNS_OF = {name: sign for sign, name in OPERATORS}


def policy_from(source: Mapping[str, Any] | str | Path) -> PruningPolicy:
    """Make a policy from a dict, from a text as typed on the command line, or from a YAML file that holds such a dict.

    A dict has the policy's name under "policy" and its settings beside it, as ``PruningPolicy.to_dict`` writes them;
    those left out have their defaults. The policies of "stages", "union" and "intersection" are dicts (or texts) too; a
    function stands as "package.module:name" and is imported, so read only what you trust.

    A text is ``NAME[:field=value,...]``; the entries of a tuple are separated by "/". ``p + q`` is ``Stages([p, q])``,
    ``p & q`` an intersection and ``p | q`` a union; as in Python, ``+`` binds tightest and ``|`` least, and there are
    parentheses. Values are read as the type of their field: ``keep=64`` is tokens per image, ``keep=1.0`` a share.

    Args:
        source: a ``Path``, and a text that ends in ".yaml" or ".yml", is the path of a file.

    Raises:
        InputError: unknown or broken policy, unknown field, a value of the wrong type or out of range, a file that
            cannot be read, a text that cannot be parsed.

    Example:
        >>> policy_from("fastv:layer=3,keep=64") == policy_from({"policy": "fastv", "layer": 3, "keep": 64})
        True
        >>> policy_from("divprune:keep=0.5 + random_deep:layer=20,keep=0.25").layers
        (0, 20)
        >>> policy_from("fastv:layer=two")
        Traceback (most recent call last):
            ...
        vlmprune.errors.InputError: layer: expected int, got 'two'
    """
    file = isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml")))
    data: object = _load(Path(str(source))) if file else parse(source) if isinstance(source, str) else source
    named = isinstance(data, Mapping) and isinstance(data.get("policy"), str)
    check(named, "policy", "a dict with a name under 'policy', a text or a YAML file", repr(data))
    assert isinstance(data, Mapping)
    name = data["policy"]
    made = policy_class(name)
    known = fields_of(made)
    hints = typing.get_type_hints(made)
    settings: dict[str, Any] = {}
    for field, value in data.items():
        if field != "policy":
            check_known(field, known, f"policy {name}", "one of the fields")
            settings[field] = read_setting(value, hints[field], field)
    missing = [field for field, default in known.items() if default is MISSING and field not in settings]
    check(not missing, f"policy {name}", f"a value for {', '.join(missing)}", "none")
    try:
        return made(**settings)
    except InputError:
        raise
    except ValueError as error:  # a foreign policy's own way to refuse a setting
        raise InputError(f"policy {name}: {first_line(error)}") from error


def named(policies: Sequence[str | PruningPolicy]) -> dict[str, PruningPolicy]:
    """Policies by what tables call them: as typed, or as ``str`` has them. Raises InputError as ``policy_from``, or for other things.

    >>> list(named(["fastv:layer=3", policy_from("fastv:layer=4")]))
    ['fastv:layer=3', 'FastV(layer=4)']
    """
    check_listed(policies)
    return {str(some): policy_from(some) if isinstance(some, str) else some for some in policies}


def check_listed(policies: Sequence[str | PruningPolicy]) -> None:
    """Raise InputError for anything but a list of texts and policies, a text by itself among it."""
    listed = isinstance(policies, Sequence) and not isinstance(policies, str)
    fine = listed and all(isinstance(some, str | PruningPolicy) for some in policies)
    check(fine, "policies", "a list of texts and policies", repr(policies))


def write(policy: PruningPolicy) -> dict[str, Any]:
    """The dict of a policy, its name and all its settings. Raises InputError for what has no name to be found by."""
    name = name_of(type(policy))
    settings = {field: _plain(getattr(policy, field), field) for field in fields_of(type(policy))}
    return {"policy": name, **settings}


def to_yaml(policy: PruningPolicy) -> str:
    """The text of a file that ``policy_from`` reads as this policy. Raises InputError as ``write`` does."""
    return yaml.safe_dump(write(policy), sort_keys=False)


def to_text(policy: PruningPolicy) -> str:
    """The policy as typed after ``--policy``: its name and the settings that are not the defaults.

    Raises:
        InputError: as ``write`` does; or a setting that cannot be typed, such as a text with a comma in it.

    Example:
        >>> from vlmprune import Feather
        >>> to_text(Feather(layers=(2, 5), keep=0.3))
        'feather:layers=2/5'
    """
    text = _typed(policy)
    try:
        same = policy_from(text) == policy
    except InputError:
        same = False
    check(same, "policy", "settings that can be typed", repr(policy))
    return text


def read_setting(value: Any, hint: Any, name: str) -> Any:
    """Read ``value``, typed (``Word``) or plain data, as int, float, str, bool, Literal, None, policy, function, a tuple
    of these or a union.

    Plain data is what it is: 1 stays an int and 1.0 a float. Of a union the first member that fits wins, in the order
    of writing: typed for ``int | float``, "64" is an int. Where only a float fits, a typed "1" is refused: ``keep=1`` is
    one token, and never everything.

    Raises:
        InputError: the value does not fit; names the setting and the type.
    """
    found, wanted = _fits(value, hint, name), spell_type(hint)
    digits = isinstance(value, Word) and any(map(str.isdecimal, value.split("/")))
    point = (
        " (with a decimal point, as in 1.0)" if digits and "float" in wanted and "int" not in wanted else ""
    )
    if not found:
        raise InputError(f"{name}: expected {wanted}{point}, got {value!r}{nearest(value, _words(hint))}")
    return found[0]


def spell_type(hint: Any) -> str:
    """How a type is written in messages: "int or float", "'last' or 'mean'", "int/int"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS or hint in WORDS:
        return " or ".join(WORDS[hint] if hint in WORDS else map(spell_type, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return "/".join("..." if a is ... else spell_type(a) for a in args)
    if origin is Callable or _is_protocol(hint):
        return "a function as package.module:name"
    return getattr(hint, "__name__", str(hint)) if origin is None else f"a list of {spell_type(args[0])}"


def _words(hint: Any) -> list[str]:
    """The words that can be typed for a type."""
    if hint in WORDS:
        return list(WORDS[hint])
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return list(map(str, args))
    return [word for arg in args for word in _words(arg)] if origin in (*UNIONS, tuple, Sequence) else []


def _fits(value: Any, hint: Any, name: str) -> list[Any]:
    """``value`` as ``hint``, alone in a list; nothing if it does not fit."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    typed, origin, args = isinstance(value, Word), typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        return next(filter(None, (_fits(value, member, name) for member in args)), [])
    if hint in WORDS or origin is Literal:
        words = WORDS[hint] if hint in WORDS else {str(word): word for word in args}
        return [
            w
            for text, w in words.items()
            if (text == value if typed else type(w) is type(value) and w == value)
        ]
    if origin in (tuple, Sequence):
        if not (typed or isinstance(value, list | tuple)):
            return []
        entries = value.split("/") if typed else value
        kinds = args[:1] * len(entries) if origin is Sequence or args[-1:] == (...,) else args
        parts = [_fits(Word(e) if typed else e, kind, name) for e, kind in zip(entries, kinds, strict=False)]
        return [tuple(part[0] for part in parts)] if len(entries) == len(kinds) and all(parts) else []
    if origin is Callable or _is_protocol(hint):
        return [_imported(value, name)] if isinstance(value, str) and ":" in value else []
    if isinstance(hint, type) and issubclass(hint, PruningPolicy):
        return [policy_from(value)]
    if (
        hint not in (int, float, str)
        or isinstance(value, bool)
        or (typed and hint is float and value.isdecimal())
    ):
        return []
    if typed:
        try:
            return [hint(str(value))]
        except ValueError:
            return []
    # A plain int is let through as a float: the policy says whether it takes one.
    return [value] if isinstance(value, int | float if hint is float else hint) else []


def _is_protocol(hint: Any) -> bool:
    """Whether it says what can be called or used, whatever its class: only code has such things."""
    return isinstance(hint, type) and typing.Protocol in hint.__bases__


def _imported(path: str, name: str) -> Any:
    """What ``package.module:qualified.name`` names."""
    module, _, qualname = path.partition(":")
    try:
        return reduce(getattr, qualname.split("."), import_module(module))
    except FAULTS as error:
        got = f"{path!r}: {type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name}: expected a function that can be imported, got {got}") from error


def _plain(value: Any, name: str) -> Any:
    """A setting as plain data."""
    if isinstance(value, PruningPolicy):
        return write(value)
    if isinstance(value, tuple | list):
        return [_plain(entry, name) for entry in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # without what a subclass adds, which YAML could not write
    if value is None:
        return None
    function = value.function if isinstance(value, Checked) else value
    try:
        path = f"{function.__module__}:{function.__qualname__}"
        found = not path.startswith("__main__:") and _imported(path, name) is function
    except (AttributeError, InputError):
        found = False
    check(found, name, "data, or a function that can be imported by its name", repr(value))
    return path


def _typed(policy: PruningPolicy) -> str:
    """A policy as text; one among its settings, and what signs join, stands in parentheses."""
    data, usual = write(policy), fields_of(type(policy))
    if data["policy"] in SIGNS_OF:
        members = [getattr(policy, name) for name in usual if name not in SHARED]
        parts = [part for some in members for part in (some if isinstance(some, tuple) else [some])]
        return f" {SIGNS_OF[data['policy']]} ".join(f"({_typed(part)})" for part in parts)
    words, hints = [], typing.get_type_hints(type(policy))
    for name, default in usual.items():
        value = getattr(policy, name)
        if value == default:
            continue
        if isinstance(value, PruningPolicy):
            words.append(f"{name}=({_typed(value)})")
        else:
            entries = data[name] if isinstance(data[name], list) else [data[name]]
            if hints[name] is float:  # an int is read where a float is meant, but not typed
                entries = [float(entry) for entry in entries]
            words.append(f"{name}={'/'.join(map(_word, entries))}")
    return f"{data['policy']}{':' if words else ''}{','.join(words)}"


def _word(entry: Any) -> str:
    return "none" if entry is None else str(entry).lower() if isinstance(entry, bool) else str(entry)


def _load(file: Path) -> object:
    """What a YAML file holds."""
    try:
        return yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"policy: expected a YAML file, got {str(file)!r}: {first_line(error)}") from error
