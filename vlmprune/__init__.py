"""Visual-token pruning for vision-language models. Importing this imports neither transformers nor triton.

Every pruning method is importable from here by its class name (``vlmprune.FastV``); ``list_policies`` has their names.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from vlmprune.errors import BackendError, InputError, ModelError, NotPrunedError, VersionError
from vlmprune.register import register as _register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlmprune import bench as bench
    from vlmprune import compensation as compensation
    from vlmprune import errors as errors
    from vlmprune import eval as eval
    from vlmprune import flops as flops
    from vlmprune import guidance as guidance
    from vlmprune import images as images
    from vlmprune import models as models
    from vlmprune import ops as ops
    from vlmprune import policies as policies
    from vlmprune import testing as testing
    from vlmprune import training as training
    from vlmprune.models import Graphs, Report, Run, StageRecord, attach, detach, meter, prune, warmup
    from vlmprune.policies import (
        ACCM,
        AIM,
        DART,
        EVS,
        LVLMCSP,
        SCOPE,
        SGL,
        STAR,
        TRIM,
        VTW,
        ACCMSelection,
        AgilePruner,
        AttentionInputs,
        CDPruner,
        Custom,
        DivPrune,
        DyCoke,
        FasterVLM,
        FastV,
        FastVID,
        Feather,
        FiCoCo,
        FitPrune,
        FlashVID,
        FlowCut,
        Folder,
        GlobalCom2,
        GreedyPrune,
        Grid,
        HiPrune,
        HiRED,
        HoliTom,
        HoloV,
        Insertion,
        Intersection,
        KNorm,
        Learned,
        MMTok,
        MustDrop,
        Needs,
        PriorTR,
        PruMerge,
        PruneSID,
        PruneVid,
        PruningPolicy,
        PyramidDrop,
        Random,
        RandomDeep,
        Reduction,
        Scout,
        SparseVLM,
        SparseVLMPlus,
        Stages,
        TokenContext,
        ToMe,
        Uniform,
        Union,
        V2Drop,
        VidCom2,
        VisionAttention,
        VisionTrim,
        VisionZip,
        VisPruner,
        VScan,
        WithoutSinks,
        ZOOPrune,
        keep_for_flops,
        keep_for_mean_tokens,
        list_policies,
        policy_from,
    )

__all__ = [
    "ACCM",
    "AIM",
    "DART",
    "EVS",
    "LVLMCSP",
    "SCOPE",
    "SGL",
    "STAR",
    "TRIM",
    "VTW",
    "ACCMSelection",
    "AgilePruner",
    "AttentionInputs",
    "BackendError",
    "CDPruner",
    "Custom",
    "DivPrune",
    "DyCoke",
    "FastV",
    "FastVID",
    "FasterVLM",
    "Feather",
    "FiCoCo",
    "FitPrune",
    "FlashVID",
    "FlowCut",
    "Folder",
    "GlobalCom2",
    "Graphs",
    "GreedyPrune",
    "Grid",
    "HiPrune",
    "HiRED",
    "HoliTom",
    "HoloV",
    "InputError",
    "Insertion",
    "Intersection",
    "KNorm",
    "Learned",
    "MMTok",
    "ModelError",
    "MustDrop",
    "Needs",
    "NotPrunedError",
    "PriorTR",
    "PruMerge",
    "PruneSID",
    "PruneVid",
    "PruningPolicy",
    "PyramidDrop",
    "Random",
    "RandomDeep",
    "Reduction",
    "Report",
    "Run",
    "Scout",
    "SparseVLM",
    "SparseVLMPlus",
    "StageRecord",
    "Stages",
    "ToMe",
    "TokenContext",
    "Uniform",
    "Union",
    "V2Drop",
    "VScan",
    "VersionError",
    "VidCom2",
    "VisPruner",
    "VisionAttention",
    "VisionTrim",
    "VisionZip",
    "WithoutSinks",
    "ZOOPrune",
    "attach",
    "detach",
    "keep_for_flops",
    "keep_for_mean_tokens",
    "list_policies",
    "meter",
    "policy_from",
    "prune",
    "warmup",
]

_MODELS = ("Graphs", "Report", "Run", "StageRecord", "attach", "detach", "meter", "prune", "warmup")


if not TYPE_CHECKING:  # which must see an unknown name as an error

    def __getattr__(name: str) -> Any:
        """Load the wiring (which imports transformers), the policies, or any other submodule when first asked for."""
        if name in _MODELS:
            return getattr(import_module("vlmprune.models"), name)
        if name in __all__:
            return getattr(import_module("vlmprune.policies"), name)
        if not name.startswith("_") and find_spec(f"vlmprune.{name}"):
            return import_module(f"vlmprune.{name}")
        raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Everything importable from here, submodules included."""
    return sorted({*globals(), *__all__, *(module.name for module in iter_modules(__path__))})


_register()
