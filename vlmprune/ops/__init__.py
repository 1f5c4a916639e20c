"""The only door to kernels: checked ops with a reference, a fake and a table of backends."""

from vlmprune.ops._dispatch import backend_of, can_run, use_backend
from vlmprune.ops.cluster_dpc import cluster_dpc
from vlmprune.ops.compact_kv import compact_kv
from vlmprune.ops.gather_tokens import gather_tokens
from vlmprune.ops.greedy_select import greedy_select
from vlmprune.ops.match_bipartite import match_bipartite
from vlmprune.ops.merge_tokens import merge_tokens
from vlmprune.ops.plan import PrunePlan, ScoredPlan
from vlmprune.ops.prune_tokens import Pruned, prune_scored, prune_tokens
from vlmprune.ops.received_attention import received_attention
from vlmprune.ops.row_lse import row_lse
from vlmprune.ops.select_topk import select_topk

__all__ = [
    "PrunePlan",
    "Pruned",
    "ScoredPlan",
    "backend_of",
    "can_run",
    "cluster_dpc",
    "compact_kv",
    "gather_tokens",
    "greedy_select",
    "match_bipartite",
    "merge_tokens",
    "prune_scored",
    "prune_tokens",
    "received_attention",
    "row_lse",
    "select_topk",
    "use_backend",
]
