"""lmms-eval: its model ``vlmprune``, announced by the entry point ``lmms_eval.models`` and loaded when it is chosen."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: the model's name and where its class is. Called by every run of lmms-eval, so light."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlmprune", chat_class_path=f"{__name__}.model.VLMPrune")
