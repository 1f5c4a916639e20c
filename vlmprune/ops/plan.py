"""Plans: prune_tokens and prune_scored for one set of shapes, with every decision made before the first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from torch import Tensor

from vlmprune.errors import check
from vlmprune.ops._recorded import RecordedPlan
from vlmprune.ops.prune_tokens import Pruned, PruneKeywords, ScoredKeywords, checked, checked_scored
from vlmprune.ops.scoring import Scored, Scoring, ScoringKeywords
from vlmprune.ops.selection import Selection


class PrunePlan(RecordedPlan):
    """``prune_tokens`` with workspace and compiled kernels kept: a run allocates its outputs, packs pointers and launches.

    A run compiles and waits for nothing; it gives the bits of ``prune_tokens``, without gradients. What it returns is its
    caller's: no later run touches it. ``bind`` does all but the launches, once for many runs; its function can be captured
    in a CUDA graph and replayed. The workspace resets itself. Threads may share a plan on one stream; two streams need two,
    and a stream other than the one a plan was made on must wait for that one before its first run.

    Args:
        query, key, tensors, how: examples, as for ``prune_tokens``; the plan keeps shapes, strides, dtypes, device, numbers
            and words, and no data of theirs. The kernels must be able to read them in place: lists, masks and weights are
            contiguous, cos and sin have equal strides.

    Raises:
        InputError: as ``prune_tokens``, or an example would have to be copied at every run.
        BackendError: Triton cannot run on the device of ``query``.

    Example:
        Not run by the tests, as there are no kernels without a GPU. ``step`` is called once a prompt:

        >>> lists = dict(rows=rows, columns=columns)  # doctest: +SKIP
        >>> plan = ops.PrunePlan(query, key, [hidden], keep=128, **lists)  # doctest: +SKIP
        >>> step = plan.bind(query, key, [hidden], **lists)  # doctest: +SKIP
        >>> step().index.shape  # doctest: +SKIP
        torch.Size([1, 192])
    """

    OUTPUTS = ("index", "count", "scores", "kept", "columns", "cu_seqlens")

    def __init__(
        self, query: Tensor, key: Tensor, tensors: Sequence[Tensor], **how: Unpack[PruneKeywords]
    ) -> None:
        tensors, selection, s = checked(query, key, tensors, **how)
        check(s.rows.shape[0] > 0, "rows", "at least one sample", tuple(s.rows.shape))
        fields = s._asdict() | selection._asdict()
        super().__init__("prune_tokens", fields, tensors, _prune_arguments)

    def run(self, query: Tensor, key: Tensor, tensors: Sequence[Tensor], **named: Any) -> Pruned:
        """Prune these tensors: ``bind`` them and call what it returns. Arguments and errors are those of ``bind``.

        Host time grows with the number of tensors, each of which is compared with its example.
        """
        return self.bind(query, key, tensors, **named)()

    def bind(
        self,
        query: Tensor,
        key: Tensor,
        tensors: Sequence[Tensor],
        *,
        keep: Tensor | None = None,
        code: Tensor | None = None,
        segments: Tensor | None = None,
        at: Tensor | None = None,
        at_mask: Tensor | None = None,
        out: Sequence[Tensor] | None = None,
        **scoring: Unpack[ScoringKeywords],
    ) -> Callable[[], Pruned]:
        """Check these tensors, which are like the examples, once for many runs; ``keep`` only if it was a tensor.

        ``scoring`` takes the keywords of the plan that are tensors. The addresses are read here: after ``x.data = y``,
        ``x.resize_``, ``x.set_`` or a move of a tensor's storage (offloading, sharding) bind again, as ``run`` does each time.

        Args:
            out: where the gathered tensors go, contiguous, shaped like those the plan returns; None = new ones.

        Returns:
            A function that prunes what the tensors hold when it is called; it keeps them alive, and its host time does
            not depend on how many they are. Every call fills, and returns, the same ``Pruned``, which is its own.

        Raises:
            InputError: a tensor differs from its example, or one more or one fewer is given.
        """
        selection = dict(keep=keep, code=code, segments=segments, at=at, at_mask=at_mask)
        every = _by_name(query=query, key=key, **selection, **scoring)
        return _returning(*self._bind(every, tensors, out))

    def _pruned(self, gathered: list[Tensor], others: list[Tensor], inputs: list[Tensor]) -> Pruned:
        return Pruned(gathered, *others)


class ScoredPlan(RecordedPlan):
    """``prune_scored`` with workspace and compiled kernels kept: as ``PrunePlan``, for scores that are there already.

    Args:
        scores, tensors, how: examples, as for ``prune_scored``.

    Raises:
        InputError, BackendError: as ``PrunePlan``.

    Example:
        >>> plan = ops.ScoredPlan(scores, [features], keep=128)  # doctest: +SKIP
        >>> plan.run(scores, [features]).index.shape  # doctest: +SKIP
        torch.Size([1, 128])
    """

    OUTPUTS = ("index", "count", "kept", "columns")

    def __init__(self, scores: Tensor, tensors: Sequence[Tensor], **how: Unpack[ScoredKeywords]) -> None:
        tensors, selection, scored = checked_scored(scores, tensors, **how)
        check(scores.shape[0] > 0, "scores", "at least one sample", tuple(scores.shape))
        fields = scored._asdict() | selection._asdict()
        own = ("columns",) if how.get("columns") is None else ()
        super().__init__("prune_scored", fields, tensors, _scored_arguments, own)

    def run(self, scores: Tensor, tensors: Sequence[Tensor], **named: Any) -> Pruned:
        """Prune these tensors: ``bind`` them and call what it returns. Arguments and errors are those of ``bind``."""
        return self.bind(scores, tensors, **named)()

    def bind(
        self,
        scores: Tensor,
        tensors: Sequence[Tensor],
        *,
        out: Sequence[Tensor] | None = None,
        **named: Tensor | None,
    ) -> Callable[[], Pruned]:
        """As ``PrunePlan.bind``; ``named`` takes the keywords of the plan that are tensors."""
        return _returning(*self._bind(_by_name(scores=scores, **named), tensors, out))

    def _pruned(self, gathered: list[Tensor], others: list[Tensor], inputs: list[Tensor]) -> Pruned:
        index, count, kept, columns = others
        return Pruned(gathered, index, count, inputs[0], kept, columns)


def _by_name(*, rope: Any = None, **named: Any) -> dict[str, Any]:
    """The inputs that are given, by their names in ``Scoring`` and ``Selection``."""
    if rope is not None:
        named["cos"], named["sin"] = rope
    return {name: x for name, x in named.items() if x is not None}


def _prune_arguments(tensors: list[Tensor], fields: dict[str, Any]) -> tuple[Any, ...]:
    return tensors, _record(Selection, fields), _record(Scoring, fields)


def _scored_arguments(tensors: list[Tensor], fields: dict[str, Any]) -> tuple[Any, ...]:
    return tensors, _record(Selection, fields), *_record(Scored, fields)


def _record(record: Any, fields: dict[str, Any]) -> Any:
    return record(*[fields[name] for name in record._fields])


def _returning(launch: Callable[[], None], result: Pruned) -> Callable[[], Pruned]:
    """A function that launches and returns the result."""

    def run() -> Pruned:
        launch()
        return result

    return run
