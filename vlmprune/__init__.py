"""Visual-token pruning for vision-language models. Importing this imports neither transformers nor triton.

Every pruning method is importable from here by its class name (``vlmprune.FastV``); ``list_policies`` has their names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmprune.register import register as _register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlmprune.models import attach, detach, prune
    from vlmprune.policies import (
        Custom,
        Intersection,
        PruningPolicy,
        Reduction,
        Stages,
        TokenContext,
        Union,
        keep_for_flops,
        keep_for_mean_tokens,
        list_policies,
    )

__all__ = [
    "Custom",
    "Intersection",
    "PruningPolicy",
    "Reduction",
    "Stages",
    "TokenContext",
    "Union",
    "attach",
    "detach",
    "keep_for_flops",
    "keep_for_mean_tokens",
    "list_policies",
    "prune",
]

_MODELS = ("attach", "detach", "meter", "prune")
_FUNCTIONS = ("keep_for_flops", "keep_for_mean_tokens", "list_policies")


def __getattr__(name: str) -> Any:
    """Load the wiring (which imports transformers) and the policies when first asked for."""
    if name in _MODELS:
        return getattr(import_module("vlmprune.models"), name)
    # Policy classes are capitalised; any other name would be a submodule that nobody imported.
    if name in _FUNCTIONS or name[:1].isupper():
        policies = import_module("vlmprune.policies")
        if name in policies.__all__:
            return getattr(policies, name)
    raise AttributeError(f"module 'vlmprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Everything importable from here, the pruning methods included."""
    return sorted({*globals(), *_MODELS, *import_module("vlmprune.policies").__all__})


_register()
