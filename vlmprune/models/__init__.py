"""Wiring into Hugging Face transformers: the only layer that imports it."""

from vlmprune.models._versions import SUPPORTED
from vlmprune.models.attention import explain
from vlmprune.models.family import check_config, check_layers, find_parts, patch_grid
from vlmprune.models.run import Report, Run, StageRecord
from vlmprune.models.scope import attach, detach, meter, prune

__all__ = [
    "SUPPORTED",
    "Report",
    "Run",
    "StageRecord",
    "attach",
    "check_config",
    "check_layers",
    "detach",
    "explain",
    "find_parts",
    "meter",
    "patch_grid",
    "prune",
]
