"""The table of cases: an op at a setting, who computes it, what it must return, and its fewest bytes and FLOPs.

A new op is one entry. Bytes count each input read once and each output written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vlmprune import ops
from vlmprune.ops import reference_sets
from vlmprune.ops._dispatch import explain

from . import fewest, foreign, gate
from .fewest import INT64
from .inputs import Inputs
from .providers import Provider, Run, backends, colreduce, compiled, eager


@dataclass(frozen=True)
class Case:
    """One line group of the table.

    Attributes:
        op: the op's name in the table of backends.
        run: our op on the inputs, on whatever backend is forced.
        gate: ``gate(inputs, run)`` raises WrongResultError if ``run`` computes something else.
        traffic: fewest bytes.
        work: FLOPs.
        torch: the plain PyTorch composition, None if the reference is just that; also run under torch.compile.
        ours: further ways of ours to the same result.
        others: further providers.
        variant: which setting of the op, if there are several cases.
        scored: whether the rows of the setting matter.
        all_pairs: whether all pairs of visual tokens are compared, which is left out for long prompts.
        float32_only: the dtype of the setting does not matter.
    """

    op: str
    run: Run
    gate: Callable[[Inputs, Run], None]
    traffic: Callable[[Inputs], int]
    work: Callable[[Inputs], int] = lambda x: 0
    torch: Run | None = None
    ours: tuple[Provider, ...] = ()
    others: tuple[Provider, ...] = ()
    variant: str = ""
    scored: bool = False
    all_pairs: bool = False
    float32_only: bool = False

    @property
    def name(self) -> str:
        """Op and variant."""
        return f"{self.op} {self.variant}".rstrip()

    def own(self) -> list[Provider]:
        """Our op on each of its backends, best first, and what else of ours does the same."""
        return [*backends(self.op, self.run), *self.ours]

    def providers(self) -> list[Provider]:
        """Ours first, then the others."""
        plain = [] if self.torch is None else [Provider("torch", self.torch), compiled(self.torch)]
        return [*self.own(), *plain, *self.others]


def _score(x: Inputs) -> Tensor:
    return ops.received_attention(x.query, x.key, rows=x.rows, columns=x.columns, lse=x.lse)


def _prune(x: Inputs, lse: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    out = ops.prune_tokens(
        x.query, x.key, x.tensors, rows=x.rows, columns=x.columns, keep=x.shape.keep, lse=lse
    )
    return out.index, out.tensors


def _prune_scored(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    out = ops.prune_scored(x.scores, x.tensors, columns=x.columns, keep=x.shape.keep)
    return out.index, out.tensors


def _plan(make: type[ops.PrunePlan | ops.ScoredPlan], lists: tuple[str, ...], *args: str) -> Provider:
    """A drop of which every decision was made before the first call; inputs by name."""

    def run(x: Inputs) -> tuple[Tensor, list[Tensor]]:
        given = [getattr(x, name) for name in args]
        named = {name: getattr(x, name) for name in lists}
        if lists not in x.plans:
            x.plans[lists] = make(*given, x.tensors, keep=x.shape.keep, **named)
        out = x.plans[lists].run(*given, x.tensors, **named)
        return out.index, out.tensors

    return Provider("plan", run, lambda x: dict(explain("prune_plan", x.device))["triton"])


def _segments(x: Inputs) -> Tensor:
    lengths, keeps = x.segments
    return ops.select_topk(x.scores, keeps, segments=lengths)[0]


def _segments_gate(x: Inputs, run: Run) -> None:
    """Each segment keeps its best."""
    lengths, keeps = x.segments
    parts, first = run(x).split(keeps, dim=1), 0
    for part, scores, keep in zip(parts, x.scores.split(lengths, dim=1), keeps, strict=True):
        gate.best_kept(part - first, scores, keep)
        first += scores.shape[1]


def _compact_gate(x: Inputs, run: Run) -> None:
    """On inputs of its own: the op works in place, and every timed call moves rows once more."""
    fresh, kept = Inputs(x.setting), x.index.shape[1]
    want = foreign.gather(fresh.caches, fresh.index)
    run(fresh)
    gate.equal([cache[:, :, :kept] for cache in fresh.caches], want)


def _greedy(rule: str) -> Case:
    """One update rule; ``reference`` is PyTorch, step by step."""

    def arguments(x: Inputs) -> tuple[int, str, Tensor | None, float | None]:
        relevance = None if rule == "maxmin" else x.relevance
        return x.chosen, rule, relevance, 0.5 if rule == "nms" else None

    def run(x: Inputs) -> Tensor:
        keep, rule, relevance, threshold = arguments(x)
        return ops.greedy_select(x.features, keep, rule, relevance=relevance, threshold=threshold)[0]

    def check(x: Inputs, run: Run) -> None:
        keep, rule, relevance, threshold = arguments(x)
        true = reference_sets.greedy_select(x.features.float(), keep, rule, relevance, threshold or 0.0, None)
        gate.mostly(run(x), true[0])

    return Case(
        "greedy_select",
        run,
        check,
        lambda x: fewest.feature_bytes(x, x.shape.visual) + x.chosen * INT64,
        lambda x: 2 * fewest.pairs(x) * x.model.hidden,
        others=(Provider("published loop", foreign.maxmin_loop),) if rule == "maxmin" else (),
        variant=rule,
        all_pairs=True,
    )


def _true_match(x: Inputs) -> Tensor:
    return reference_sets.match_bipartite(
        x.features.float(), x.merged, None, None, x.shape.visual - x.merged
    )[0]


def _true_clusters(x: Inputs) -> Tensor:
    return reference_sets.cluster_dpc(x.features.float(), x.clusters, x.clusters, None)[0]


CASES = (
    Case(
        "received_attention",
        _score,
        lambda x, run: gate.close(run(x), x.true_scores, x.dtype),
        fewest.score_bytes,
        lambda x: fewest.score_flops(x, x.shape.visual),
        torch=foreign.scores,
        others=(eager(foreign.eager_scores), colreduce(foreign.colreduce_scores)),
        scored=True,
    ),
    Case(
        "row_lse",
        lambda x: ops.row_lse(x.query, x.key, x.rows),
        lambda x, run: gate.close(run(x), x.true_lse, x.dtype),
        lambda x: fewest.key_bytes(x, x.shape.length) + fewest.query_bytes(x) + fewest.row_stats_bytes(x),
        lambda x: fewest.score_flops(x, x.shape.length),
        torch=foreign.row_lse,
        scored=True,
    ),
    Case(
        "select_topk",
        lambda x: ops.select_topk(x.scores, x.shape.keep)[0],
        lambda x, run: gate.best_kept(run(x), x.scores, x.shape.keep),
        lambda x: 4 * x.shape.visual + INT64 * (x.shape.keep + 1),
        torch=foreign.select,
        float32_only=True,
    ),
    Case(
        "select_segments",
        _segments,
        _segments_gate,
        lambda x: 4 * x.shape.visual + INT64 * (sum(x.segments[1]) + 1),
        torch=foreign.select_segments,
        float32_only=True,
    ),
    Case(
        "gather_tokens",
        lambda x: ops.gather_tokens(x.tensors, x.index),
        lambda x, run: gate.equal(run(x), foreign.gather(x.tensors, x.index)),
        lambda x: fewest.copy_bytes(x.tensors, x.shape.kept),
        torch=lambda x: foreign.gather(x.tensors, x.index),
    ),
    Case(
        "gather_tokens",
        lambda x: ops.gather_tokens(x.caches, x.index),
        lambda x, run: gate.equal(run(x), foreign.gather(x.caches, x.index)),
        lambda x: fewest.copy_bytes(x.caches, x.shape.kept),
        torch=lambda x: foreign.gather(x.caches, x.index),
        variant="all KV",
    ),
    Case(
        "compact_kv",
        lambda x: ops.compact_kv(x.caches, x.index),
        _compact_gate,
        lambda x: fewest.copy_bytes(x.caches, x.shape.kept),
        torch=lambda x: foreign.compact(x.caches, x.index),
    ),
    Case(
        "prune_tokens",
        lambda x: _prune(x, x.lse),
        lambda x, run: gate.pruned(x, run(x)),
        lambda x: fewest.score_bytes(x) + fewest.copy_bytes(x.tensors, x.shape.kept),
        lambda x: fewest.score_flops(x, x.shape.visual),
        torch=foreign.prune,
        ours=(_plan(ops.PrunePlan, ("rows", "columns", "lse"), "query", "key"),),
        others=(
            Provider("scores + topk", foreign.topk_prune),
            eager(foreign.eager_prune),
            colreduce(foreign.colreduce_prune),
        ),
        scored=True,
    ),
    Case(
        "prune_tokens",
        lambda x: _prune(x, None),
        lambda x, run: gate.pruned(x, run(x)),
        lambda x: (
            fewest.score_bytes(x)
            + fewest.key_bytes(x, x.shape.length)
            + fewest.copy_bytes(x.tensors, x.shape.kept)
        ),
        lambda x: fewest.score_flops(x, x.shape.visual + x.shape.length),
        ours=(_plan(ops.PrunePlan, ("rows", "columns"), "query", "key"),),
        variant="no LSE",
        scored=True,
    ),
    Case(
        "prune_scored",
        _prune_scored,
        lambda x, run: gate.pruned(x, run(x), x.scores),
        lambda x: (4 + INT64) * x.shape.visual + fewest.copy_bytes(x.tensors, x.shape.kept),
        torch=foreign.prune_scored,
        ours=(_plan(ops.ScoredPlan, ("columns",), "scores"),),
    ),
    *(_greedy(rule) for rule in reference_sets.RULES),
    Case(
        "merge_tokens",
        lambda x: ops.merge_tokens(x.features, x.assignment, x.clusters),
        lambda x, run: gate.close(run(x), foreign.merge(x), x.dtype),
        lambda x: fewest.feature_bytes(x, x.shape.visual + x.clusters) + x.shape.visual * INT64,
        lambda x: fewest.feature_bytes(x, x.shape.visual) // x.dtype.itemsize,
        torch=foreign.merge,
    ),
    Case(
        "cluster_dpc",
        lambda x: ops.cluster_dpc(x.features, x.clusters)[0],
        lambda x, run: gate.same_partition(run(x), _true_clusters(x)),
        lambda x: fewest.feature_bytes(x, x.shape.visual) + x.shape.visual * INT64,
        lambda x: 3 * fewest.pairs(x) * x.model.hidden,
        torch=foreign.cluster,
        all_pairs=True,
    ),
    Case(
        "match_bipartite",
        lambda x: ops.match_bipartite(x.features, x.merged),
        lambda x, run: gate.same_partition(run(x)[0], _true_match(x)),
        lambda x: fewest.feature_bytes(x, x.shape.visual) + (2 * x.shape.visual - x.merged) * INT64,
        lambda x: 2 * (x.shape.visual // 2) ** 2 * x.model.hidden,
        torch=foreign.match,
        all_pairs=True,
    ),
)
