"""The one source of policy names: the built-in methods, and those that other packages announce by entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib import import_module, metadata
from typing import Any

from vlmprune.errors import InputError, check, first_line
from vlmprune.policies.base import PruningPolicy

GROUP = "vlmprune.policies"
"""Entry-point group: ``name = "package.module:PolicyClass"``."""

BUILT_IN: Mapping[str, str] = {
    "fastv": "fastv.FastV",
    "feather": "feather.Feather",
    "pyramiddrop": "pyramiddrop.PyramidDrop",
    "sparsevlm": "sparsevlm.SparseVLM",
    "sparsevlm_plus": "sparsevlm_plus.SparseVLMPlus",
    "dart": "dart.DART",
    "vscan": "vscan.VScan",
    "fastervlm": "fastervlm.FasterVLM",
    "visionzip": "visionzip.VisionZip",
    "vispruner": "vispruner.VisPruner",
    "divprune": "divprune.DivPrune",
    "cdpruner": "cdpruner.CDPruner",
    "random_deep": "random_deep.RandomDeep",
    "random": "random.Random",
    "uniform": "uniform.Uniform",
}
"""Name -> file and class in ``vlmprune/policies``. A new method is one file and one row here."""

COMPOSED: Mapping[str, str] = {
    "stages": "compose.Stages",
    "union": "compose.Union",
    "intersection": "compose.Intersection",
    "custom": "custom.Custom",
}
"""Likewise, for what is made of policies or of a function: no methods of their own, so they are not listed."""

OURS: Mapping[str, str] = {**BUILT_IN, **COMPOSED}

FAULTS: tuple[type[Exception], ...] = (
    ImportError,
    SyntaxError,
    NameError,
    AttributeError,
    TypeError,
    ValueError,
)
FAULTS += (LookupError, OSError, ArithmeticError, AssertionError, RuntimeError)
"""What importing another package, or making its policy with default settings, may raise if it is broken."""


@cache
def built_in(name: str) -> type[PruningPolicy]:
    """The class behind one of our own names; its file is imported when first asked for."""
    module, _, cls = OURS[name].partition(".")
    found: type[PruningPolicy] = getattr(import_module(f"vlmprune.policies.{module}"), cls)
    return found


def class_names() -> dict[str, str]:
    """Class name -> policy name, for the built-in policies."""
    return {path.partition(".")[2]: name for name, path in BUILT_IN.items()}


def list_policies() -> list[str]:
    """Names of every policy, the built-in ones first. Loads no foreign code, so some may turn out to be broken.

    Example:
        >>> list_policies()[:3]
        ['fastv', 'feather', 'pyramiddrop']
    """
    return list(dict.fromkeys([*BUILT_IN, *_announced()]))


def policies() -> dict[str, type[PruningPolicy]]:
    """Every policy class by name, without those of broken packages. Imports the packages that announce one."""
    return load_policies()[0]


def load_policies() -> tuple[dict[str, type[PruningPolicy]], list[str]]:
    """Every policy class by name, and what is wrong with each entry point that cannot be used."""
    found, faults = {name: built_in(name) for name in BUILT_IN}, []
    for name, entries in _announced().items():
        try:
            own = f"a name of its own for {_values(entries)}"
            check(name not in OURS, f"policy {name}", own, "a built-in policy's")
            found[name] = policy_class(name)
        except InputError as error:
            faults.append(str(error))
    return found, faults


def policy_class(name: str) -> type[PruningPolicy]:
    """The class behind a name; imports nothing but that one.

    Raises:
        InputError: a name that nobody announced, or two packages did, or whose class cannot be loaded or made.
    """
    if name in OURS:
        return built_in(name)
    announced = _announced()
    check(name in announced, "policy", f"one of {', '.join(list_policies())}", repr(name))
    entries = announced[name]
    one = len({entry.value for entry in entries}) == 1
    check(one, f"policy {name}", "one package that announces it", _values(entries))
    try:
        return _load(entries[0])
    except FAULTS as error:
        got = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"policy {name}: expected a policy in {entries[0].value}, got {got}") from error


def name_of(policy: type[PruningPolicy]) -> str:
    """The name of a class. Raises InputError for one that nobody announced; to look, it imports who announces some."""
    path = f"{policy.__module__}.{policy.__qualname__}"
    ours = (name for name, ours in OURS.items() if path == f"vlmprune.policies.{ours}")
    names = [*ours] or [name for name, found in policies().items() if found is policy]
    check(bool(names), "policy", f"a class with an entry point in {GROUP!r}", policy.__qualname__)
    return names[0]


def settings_of(policy: type[PruningPolicy]) -> list[Field[Any]]:
    """The fields that a policy is made with, its own before those of all policies."""
    return sorted((field for field in fields(policy) if field.init), key=lambda field: field.kw_only is True)


def fields_of(policy: type[PruningPolicy]) -> list[tuple[str, object]]:
    """A policy's settings as (name, default), in the order of ``settings_of``; ``dataclasses.MISSING`` = no default."""
    defaults = {field.name: _default(field) for field in settings_of(policy)}
    if MISSING in defaults.values():
        return list(defaults.items())
    made = policy()  # rather than the bare defaults: a policy may fill one in when it is made
    return [(name, getattr(made, name)) for name in defaults]


def _default(setting: Field[Any]) -> object:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _announced() -> dict[str, list[metadata.EntryPoint]]:
    """Entry points by name; more than one, or a built-in policy's name, is a clash."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry in metadata.entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    return found


def _values(entries: Sequence[metadata.EntryPoint]) -> str:
    return " and ".join(entry.value for entry in entries)


def _load(entry: metadata.EntryPoint) -> type[PruningPolicy]:
    """A foreign policy's class, tried as far as ``vlmprune list`` needs it."""
    found = entry.load()
    if not (isinstance(found, type) and issubclass(found, PruningPolicy)):
        raise TypeError(f"{found!r} is no PruningPolicy class")
    known = dict(fields_of(found))
    if "policy" in known:
        raise TypeError("a setting called 'policy', where a dict has the policy's name")
    if MISSING not in known.values():
        made = found()
        for layer in made.layers:
            made.needs(layer)
    return found
