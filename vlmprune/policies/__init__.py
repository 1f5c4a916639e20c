"""Pruning methods: tensors in, kept positions out. One short file each; ``registry`` knows their names.

Every built-in method's class is an attribute of this package (and of ``vlmprune``), imported when first asked for; what the
author of a method needs is here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmprune.policies.base import (
    AttentionInputs,
    Grid,
    Needs,
    PruningPolicy,
    Reduction,
    TokenContext,
    VisionAttention,
    attention_of,
    outcome,
)
from vlmprune.policies.by_image import images_of, spent
from vlmprune.policies.checks import (
    check_keep,
    check_layer,
    check_layers,
    check_whole,
    check_word,
)
from vlmprune.policies.choose import (
    choose_best,
    index_of,
    keep_count,
    marks,
    quotas,
    select_counts,
    select_scores,
)
from vlmprune.policies.compose import Intersection, Stages, Union
from vlmprune.policies.custom import Custom
from vlmprune.policies.recipe import policy_from
from vlmprune.policies.registry import (
    built_in,
    class_names,
    list_policies,
)
from vlmprune.policies.schedule import keep_for_flops, keep_for_mean_tokens

if TYPE_CHECKING:
    from vlmprune.policies.cdpruner import CDPruner
    from vlmprune.policies.dart import DART
    from vlmprune.policies.divprune import DivPrune
    from vlmprune.policies.fastervlm import FasterVLM
    from vlmprune.policies.fastv import FastV
    from vlmprune.policies.feather import Feather
    from vlmprune.policies.pyramiddrop import PyramidDrop
    from vlmprune.policies.random import Random
    from vlmprune.policies.random_deep import RandomDeep
    from vlmprune.policies.sparsevlm import SparseVLM
    from vlmprune.policies.sparsevlm_plus import SparseVLMPlus
    from vlmprune.policies.uniform import Uniform
    from vlmprune.policies.visionzip import VisionZip
    from vlmprune.policies.vispruner import VisPruner
    from vlmprune.policies.vscan import VScan

__all__ = [
    "DART",
    "AttentionInputs",
    "CDPruner",
    "Custom",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "Feather",
    "Grid",
    "Intersection",
    "Needs",
    "PruningPolicy",
    "PyramidDrop",
    "Random",
    "RandomDeep",
    "Reduction",
    "SparseVLM",
    "SparseVLMPlus",
    "Stages",
    "TokenContext",
    "Uniform",
    "Union",
    "VScan",
    "VisPruner",
    "VisionAttention",
    "VisionZip",
    "attention_of",
    "check_keep",
    "check_layer",
    "check_layers",
    "check_whole",
    "check_word",
    "choose_best",
    "images_of",
    "index_of",
    "keep_count",
    "keep_for_flops",
    "keep_for_mean_tokens",
    "list_policies",
    "marks",
    "outcome",
    "policy_from",
    "quotas",
    "select_counts",
    "select_scores",
    "spent",
]

if not TYPE_CHECKING:  # which must see an unknown name as an error

    def __getattr__(name: str) -> Any:
        """The class of a built-in method, by its name."""
        known = class_names()
        if name in known:
            return built_in(known[name])
        raise AttributeError(f"module 'vlmprune.policies' has no attribute {name!r}")
