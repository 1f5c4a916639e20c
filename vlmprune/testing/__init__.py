"""Checks for those who write a policy or add a model: what our own tests hold each of ours to, in one call.

``check_policy`` needs neither transformers nor a model; ``check_model`` imports transformers when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmprune.testing.model import check_model
    from vlmprune.testing.policy import check_policy

__all__ = ["check_model", "check_policy"]

if not TYPE_CHECKING:  # which must see an unknown name as an error

    def __getattr__(name: str) -> Any:
        """Load a check when it is first asked for."""
        if name in __all__:
            return getattr(import_module(f"vlmprune.testing.{name.removeprefix('check_')}"), name)
        raise AttributeError(f"module 'vlmprune.testing' has no attribute {name!r}")
