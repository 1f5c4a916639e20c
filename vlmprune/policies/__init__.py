"""Pruning methods: tensors in, kept positions out. One short file each; ``registry`` knows their names.

Every built-in method's class is an attribute of this package (and of ``vlmprune``), imported when first asked for.
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
    "fields_of",
    "keep_for_flops",
    "keep_for_mean_tokens",
    "list_policies",
    "parse_policy",
    "policies",
    "policy_class",
]
__all__ += list(class_names())


def __getattr__(name: str) -> Any:
    """The class of a built-in method, by its name."""
    known = class_names()
    if name in known:
        return built_in(known[name])
    raise AttributeError(f"module 'vlmprune.policies' has no attribute {name!r}")
