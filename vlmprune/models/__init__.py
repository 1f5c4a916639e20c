"""Wiring into Hugging Face transformers: the only layer that imports it."""

from vlmprune.models._versions import SUPPORTED, TESTED, dotted
from vlmprune.models.attention import explain
from vlmprune.models.family import check_config, check_layers, find_parts, patch_grid
from vlmprune.models.run import Report, Run, StageRecord
from vlmprune.models.scope import Scope, attach, detach, meter, prune

__all__ = [
    "SUPPORTED",
    "TESTED",
    "Report",
    "Run",
    "Scope",
    "StageRecord",
    "attach",
    "check_config",
    "check_layers",
    "detach",
    "dotted",
    "explain",
    "find_parts",
    "meter",
    "patch_grid",
    "prune",
]
