"""Pruning methods: tensors in, kept positions out. One short file each; ``registry`` knows their names.

Every built-in method's class is an attribute of this package (and of ``vlmprune``), imported when first asked for; what the
author of a method needs is here too.
"""

from __future__ import annotations

from typing import Any

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
from vlmprune.policies.registry import (
    built_in,
    class_names,
    fields_of,
    list_policies,
    parse_policy,
    policies,
    policy_class,
)
from vlmprune.policies.schedule import keep_for_flops, keep_for_mean_tokens

__all__ = [
    "AttentionInputs",
    "Custom",
    "Grid",
    "Intersection",
    "Needs",
    "PruningPolicy",
    "Reduction",
    "Stages",
    "TokenContext",
    "Union",
    "VisionAttention",
    "attention_of",
    "check_keep",
    "check_layer",
    "check_layers",
    "check_whole",
    "check_word",
    "choose_best",
    "fields_of",
    "images_of",
    "index_of",
    "keep_count",
    "keep_for_flops",
    "keep_for_mean_tokens",
    "list_policies",
    "marks",
    "outcome",
    "parse_policy",
    "policies",
    "policy_class",
    "quotas",
    "select_counts",
    "select_scores",
    "spent",
]
__all__ += list(class_names())


def __getattr__(name: str) -> Any:
    """The class of a built-in method, by its name."""
    known = class_names()
    if name in known:
        return built_in(known[name])
    raise AttributeError(f"module 'vlmprune.policies' has no attribute {name!r}")
