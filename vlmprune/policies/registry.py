"""The one source of policy names: the built-in methods, and those that other packages announce by entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import metadata

from vlmprune.errors import InputError, check, check_known, first_line
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.compose import Intersection, Stages, Union
from vlmprune.policies.custom import Custom
from vlmprune.policies.methods.accm import ACCM
from vlmprune.policies.methods.accm_selection import ACCMSelection
from vlmprune.policies.methods.agilepruner import AgilePruner
from vlmprune.policies.methods.aim import AIM
from vlmprune.policies.methods.cdpruner import CDPruner
from vlmprune.policies.methods.dart import DART
from vlmprune.policies.methods.divprune import DivPrune
from vlmprune.policies.methods.dycoke import DyCoke
from vlmprune.policies.methods.evs import EVS
from vlmprune.policies.methods.fastervlm import FasterVLM
from vlmprune.policies.methods.fastv import FastV
from vlmprune.policies.methods.fastvid import FastVID
from vlmprune.policies.methods.feather import Feather
from vlmprune.policies.methods.ficoco import FiCoCo
from vlmprune.policies.methods.fitprune import FitPrune
from vlmprune.policies.methods.flashvid import FlashVID
from vlmprune.policies.methods.flowcut import FlowCut
from vlmprune.policies.methods.folder import Folder
from vlmprune.policies.methods.globalcom2 import GlobalCom2
from vlmprune.policies.methods.greedyprune import GreedyPrune
from vlmprune.policies.methods.hiprune import HiPrune
from vlmprune.policies.methods.hired import HiRED
from vlmprune.policies.methods.holitom import HoliTom
from vlmprune.policies.methods.holov import HoloV
from vlmprune.policies.methods.knorm import KNorm
from vlmprune.policies.methods.learned import Learned
from vlmprune.policies.methods.lvlm_csp import LVLMCSP
from vlmprune.policies.methods.mmtok import MMTok
from vlmprune.policies.methods.mustdrop import MustDrop
from vlmprune.policies.methods.priortr import PriorTR
from vlmprune.policies.methods.prumerge import PruMerge
from vlmprune.policies.methods.prunesid import PruneSID
from vlmprune.policies.methods.prunevid import PruneVid
from vlmprune.policies.methods.pyramiddrop import PyramidDrop
from vlmprune.policies.methods.random import Random
from vlmprune.policies.methods.random_deep import RandomDeep
from vlmprune.policies.methods.scope import SCOPE
from vlmprune.policies.methods.scout import Scout
from vlmprune.policies.methods.sgl import SGL
from vlmprune.policies.methods.sparsevlm import SparseVLM
from vlmprune.policies.methods.sparsevlm_plus import SparseVLMPlus
from vlmprune.policies.methods.star import STAR
from vlmprune.policies.methods.tome import ToMe
from vlmprune.policies.methods.trim import TRIM
from vlmprune.policies.methods.uniform import Uniform
from vlmprune.policies.methods.v2drop import V2Drop
from vlmprune.policies.methods.vidcom2 import VidCom2
from vlmprune.policies.methods.visiontrim import VisionTrim
from vlmprune.policies.methods.visionzip import VisionZip
from vlmprune.policies.methods.vispruner import VisPruner
from vlmprune.policies.methods.vscan import VScan
from vlmprune.policies.methods.vtw import VTW
from vlmprune.policies.methods.zoo_prune import ZOOPrune
from vlmprune.policies.sinks import WithoutSinks

GROUP = "vlmprune.policies"
"""Entry-point group: ``name = "package.module:PolicyClass"``."""

BUILT_IN: Mapping[str, type[PruningPolicy]] = {
    "fastv": FastV,
    "feather": Feather,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "sparsevlm_plus": SparseVLMPlus,
    "dart": DART,
    "knorm": KNorm,
    "greedyprune": GreedyPrune,
    "v2drop": V2Drop,
    "priortr": PriorTR,
    "fitprune": FitPrune,
    "mustdrop": MustDrop,
    "ficoco": FiCoCo,
    "vscan": VScan,
    "star": STAR,
    "vtw": VTW,
    "lvlm_csp": LVLMCSP,
    "fastervlm": FasterVLM,
    "visionzip": VisionZip,
    "vispruner": VisPruner,
    "folder": Folder,
    "aim": AIM,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "scope": SCOPE,
    "mmtok": MMTok,
    "prunesid": PruneSID,
    "zoo_prune": ZOOPrune,
    "agilepruner": AgilePruner,
    "prumerge": PruMerge,
    "trim": TRIM,
    "flowcut": FlowCut,
    "tome": ToMe,
    "visiontrim": VisionTrim,
    "hired": HiRED,
    "globalcom2": GlobalCom2,
    "holov": HoloV,
    "hiprune": HiPrune,
    "evs": EVS,
    "vidcom2": VidCom2,
    "dycoke": DyCoke,
    "fastvid": FastVID,
    "flashvid": FlashVID,
    "prunevid": PruneVid,
    "holitom": HoliTom,
    "accm_selection": ACCMSelection,
    "accm": ACCM,
    "learned": Learned,
    "sgl": SGL,
    "scout": Scout,
    "random_deep": RandomDeep,
    "random": Random,
    "uniform": Uniform,
}
"""A new method is one file in ``methods`` and one row here."""

OURS: Mapping[str, type[PruningPolicy]] = {
    **BUILT_IN,
    "stages": Stages,
    "union": Union,
    "intersection": Intersection,
    "without_sinks": WithoutSinks,
    "custom": Custom,
}
"""With what is made of policies or of a function: no methods of their own, so they are not listed."""

FAULTS: tuple[type[Exception], ...] = (ImportError, SyntaxError, NameError, AttributeError, TypeError)
FAULTS += (ValueError, LookupError, OSError, ArithmeticError, AssertionError, RuntimeError)
"""What importing another package, or making its policy with default settings, may raise if it is broken."""


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
    found, faults = dict(BUILT_IN), []
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
        return OURS[name]
    announced = _announced()
    check_known(name, list_policies(), "policy")
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
    known = OURS if policy in OURS.values() else policies()
    names = [name for name, found in known.items() if found is policy]
    check(bool(names), "policy", f"a class with an entry point in {GROUP!r}", policy.__qualname__)
    return names[0]


def fields_of(policy: type[PruningPolicy]) -> dict[str, object]:
    """A policy's settings and their defaults, its own before those of all policies; MISSING = it must be given."""
    settings = sorted(
        (field for field in fields(policy) if field.init), key=lambda field: field.kw_only is True
    )
    if any(field.default is field.default_factory is MISSING for field in settings):
        return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in settings}
    made = policy()  # rather than the bare defaults: a policy may fill one in when it is made
    return {field.name: getattr(made, field.name) for field in settings}


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
    for name, told in (("summary", found.summary), ("paper", found.paper), ("checked", found.checked)):
        check(isinstance(told, str), name, "a text", repr(told))
    known = fields_of(found)
    if "policy" in known:
        raise TypeError("a setting called 'policy', where a dict has the policy's name")
    if MISSING not in known.values():
        made = found()
        check(bool(made.layers), "layers", "at least one with default settings", made.layers)
        for layer in made.layers:
            made.needs(layer)
    return found
