"""Wiring into Hugging Face transformers: the only layer that imports it."""

# isort: off
# First: it refuses versions outside the range before transformers is imported.
from vlmprune.models.host.versions import SUPPORTED, TESTED, dotted

# isort: on
from vlmprune.models.attention.backend import explain
from vlmprune.models.graphs.store import Graphs
from vlmprune.models.graphs.warmup import warmup
from vlmprune.models.host.parts import (
    check_config,
    check_stages,
    check_videos,
    find_parts,
    patch_grid,
    takes_videos,
)
from vlmprune.models.prompt import StageRecord
from vlmprune.models.report import Report, Run
from vlmprune.models.scope import Scope, attach, detach, meter, prune

__all__ = [
    "SUPPORTED",
    "TESTED",
    "Graphs",
    "Report",
    "Run",
    "Scope",
    "StageRecord",
    "attach",
    "check_config",
    "check_stages",
    "check_videos",
    "detach",
    "dotted",
    "explain",
    "find_parts",
    "meter",
    "patch_grid",
    "prune",
    "takes_videos",
    "warmup",
]
