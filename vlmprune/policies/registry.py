"""The one source of policy names: the built-in methods, plus those other packages announce by entry point."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib import import_module, metadata
from typing import Any

from vlmprune.errors import InputError, check, first_line
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.settings import read_setting

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
    "horizon": "horizon.RandomDeep",
    "random": "random.Random",
    "uniform": "uniform.Uniform",
}
"""Name -> file and class in ``vlmprune/policies``. A new method is one file and one row here."""

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
    """The class of a built-in policy; its file is imported when first asked for."""
    module, _, cls = BUILT_IN[name].partition(".")
    found: type[PruningPolicy] = getattr(import_module(f"vlmprune.policies.{module}"), cls)
    return found


def class_names() -> dict[str, str]:
    """Class name -> policy name, for the built-in policies."""
    return {path.partition(".")[2]: name for name, path in BUILT_IN.items()}


def list_policies() -> list[str]:
    """Names of every policy, the built-in ones first. Loads no foreign code, so some may turn out to be broken."""
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
            check(name not in BUILT_IN, f"policy {name}", own, "a built-in policy's")
            found[name] = policy_class(name)
        except InputError as error:
            faults.append(str(error))
    return found, faults


def policy_class(name: str) -> type[PruningPolicy]:
    """The class behind a name; imports nothing but that one.

    Raises:
        InputError: a name that nobody announced, or two packages did, or whose class cannot be loaded or made.
    """
    if name in BUILT_IN:
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


def fields_of(policy: type[PruningPolicy]) -> list[tuple[str, object]]:
    """A policy's settings as (name, default), its own before those of all policies; ``dataclasses.MISSING`` = no default."""
    settings = sorted(fields(policy), key=lambda f: f.kw_only is True)
    defaults = {f.name: _default(f) for f in settings if f.init}
    if MISSING in defaults.values():
        return list(defaults.items())
    made = policy()  # rather than the bare defaults: a policy may fill one in when it is made
    return [(name, getattr(made, name)) for name in defaults]


def parse_policy(text: str) -> PruningPolicy:
    """Make a policy from ``NAME[:field=value,...]``, for example ``feather:layers=2/5,keep=0.3``.

    Values are read as the type of the field: ``keep=64`` is tokens per image, ``keep=1.0`` a share; the entries of
    a tuple are separated by "/".

    Raises:
        InputError: unknown or broken policy, unknown field, a value that does not parse, or a setting out of range.
    """
    name, colon, rest = text.partition(":")
    made = policy_class(name)
    known = dict(fields_of(made))
    hints = typing.get_type_hints(made)
    settings: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        field, equals, value = item.partition("=")
        check(bool(equals), f"policy {name}", "field=value, ...", repr(item))
        check(field in known, f"policy {name}", f"one of the fields {', '.join(known)}", repr(field))
        check(field not in settings, f"policy {name}", "each field once", f"{field} twice")
        settings[field] = read_setting(value, hints[field], field)
    missing = [field for field, default in known.items() if default is MISSING and field not in settings]
    check(not missing, f"policy {name}", f"a value for {', '.join(missing)}", "none")
    try:
        return made(**settings)
    except InputError:
        raise
    except ValueError as error:  # a foreign policy's own way to refuse a setting
        raise InputError(f"policy {name}: {first_line(error)}") from error


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
    if MISSING not in dict(fields_of(found)).values():
        made = found()
        for layer in made.layers:
            made.needs(layer)
    return found
