"""Words for what pruning drops: the interface of compensators, and the one of ACCM, a captioner and a selector.

The interface, ``Known`` and ``Remembering`` are light; the models import transformers when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmprune.compensation.interface import Caption as Caption
from vlmprune.compensation.interface import Compensator as Compensator
from vlmprune.compensation.interface import Discarded as Discarded
from vlmprune.compensation.known import Known as Known
from vlmprune.compensation.remembering import Remembering as Remembering

if TYPE_CHECKING:
    from vlmprune.compensation.captioner import Captioner, Drafts
    from vlmprune.compensation.configs import CaptionerConfig, SelectorConfig
    from vlmprune.compensation.describer import Describer, load_compensator
    from vlmprune.compensation.selector import Selector

__all__ = [
    "Caption",
    "Captioner",
    "CaptionerConfig",
    "Compensator",
    "Describer",
    "Discarded",
    "Drafts",
    "Known",
    "Remembering",
    "Selector",
    "SelectorConfig",
    "load_compensator",
]

_MODELS = {
    "Captioner": "captioner",
    "CaptionerConfig": "configs",
    "Describer": "describer",
    "Drafts": "captioner",
    "Selector": "selector",
    "SelectorConfig": "configs",
    "load_compensator": "describer",
}

if not TYPE_CHECKING:  # which must see an unknown name as an error

    def __getattr__(name: str) -> Any:
        """Load a model of ACCM (which imports transformers) when it is first asked for."""
        if name in _MODELS:
            return getattr(import_module(f"vlmprune.compensation.{_MODELS[name]}"), name)
        raise AttributeError(f"module 'vlmprune.compensation' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Everything importable from here."""
    return sorted({*globals(), *__all__})
