"""Makes ``attn_implementation="vlmprune"`` known to transformers, whichever of the two packages is imported first.

transformers has no entry point for attention functions and importing vlmprune must not import transformers. So where
it is not loaded yet, a finder waits for its ``modeling_utils``, adds our own two names once that module has run, and
removes itself. Nothing that transformers registered is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NAME = "vlmprune"
"""The value of ``attn_implementation``."""
HOST = "transformers.modeling_utils"
WIRING = "vlmprune.models.attention.backend"


def register() -> None:
    """Add the names now if transformers is loaded, else as soon as it is."""
    if HOST in sys.modules:
        add_names()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def add_names() -> None:
    """Register stand-ins that load the wiring when first called; the wiring then registers itself in their place."""
    tables = {
        import_module(HOST).AttentionInterface: _attention,
        import_module("transformers.masking_utils").AttentionMaskInterface: _mask,
    }
    for table, stand_in in tables.items():
        if NAME not in table():
            table.register(NAME, stand_in)


def _attention(*args: Any, **kwargs: Any) -> Any:
    return import_module(WIRING).attention(*args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    return import_module(WIRING).mask(*args, **kwargs)


class _Waiting(MetaPathFinder):
    """Finds the one module it waits for as everybody else would, but with a loader that adds our names afterwards."""

    asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's usual spec, its loader wrapped; None for every other module."""
        if fullname != HOST or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Adding(spec.loader, self)
        return spec


class _Adding(Loader):
    """Runs a module with its own loader, gives that loader back to it, and adds our names."""

    def __init__(self, usual: Loader, finder: _Waiting) -> None:
        self.usual, self.finder = usual, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The usual loader's module."""
        return self.usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module; only if that succeeds is the wait over."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.usual
        self.usual.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        add_names()
