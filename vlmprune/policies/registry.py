"""The one source of policy names: the built-in methods, plus those other packages announce by entry point."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib import import_module, metadata
from typing import Any

from vlmprune.errors import check
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
    """Names of every policy, the built-in ones first. Loads no foreign code."""
    return [*BUILT_IN, *_foreign()]


def policies() -> dict[str, type[PruningPolicy]]:
    """Every policy class by name. Imports the packages that announce one.

    Raises:
        ValueError: two policies of one name, or an entry point that is no PruningPolicy.
    """
    return {name: policy_class(name) for name in list_policies()}


def policy_class(name: str) -> type[PruningPolicy]:
    """The class behind a name; imports nothing but that one. Raises ValueError for a name nobody announced."""
    if name in BUILT_IN:
        return built_in(name)
    foreign = _foreign()
    check(name in foreign, "policy", f"one of {', '.join([*BUILT_IN, *foreign])}", repr(name))
    entry = foreign[name]
    found = entry.load()
    ok = isinstance(found, type) and issubclass(found, PruningPolicy)
    check(ok, f"entry point {name} = {entry.value}", "a PruningPolicy class", repr(found))
    return found


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
        ValueError: unknown policy or field, a value that does not parse, or a setting out of range.
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
    return made(**settings)


def _default(setting: Field[Any]) -> object:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _foreign() -> dict[str, metadata.EntryPoint]:
    found: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=GROUP):
        taken = "a built-in policy" if entry.name in BUILT_IN else found.get(entry.name)
        what = f"entry point {entry.name} = {entry.value}"
        check(taken is None, what, "a name of its own", f"the name of {getattr(taken, 'value', taken)}")
        found[entry.name] = entry
    return found
