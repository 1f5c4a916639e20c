"""Visual-token pruning for vision-language models. Importing this imports neither transformers nor triton."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlmprune.models import attach, detach, prune
    from vlmprune.policies import (
        Custom,
        FastV,
        Feather,
        PruningPolicy,
        Random,
        Stages,
        TokenContext,
        Uniform,
        Union,
    )
    from vlmprune.policies.registry import list_policies

__all__ = [
    "Custom",
    "FastV",
    "Feather",
    "PruningPolicy",
    "Random",
    "Stages",
    "TokenContext",
    "Uniform",
    "Union",
    "attach",
    "detach",
    "list_policies",
    "prune",
]

_MODELS = ("attach", "detach", "meter", "prune")


def __getattr__(name: str) -> Any:
    """Load the wiring (which imports transformers) and the policies when first asked for."""
    if name in _MODELS:
        return getattr(import_module("vlmprune.models"), name)
    if name == "list_policies":
        return import_module("vlmprune.policies.registry").list_policies
    if name[:1].isupper():  # policy classes; anything else would be a submodule that nobody imported
        policies = import_module("vlmprune.policies")
        if name in policies.__all__:
            return getattr(policies, name)
    raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")
