"""The plans of one model's passes: made for shapes that come again, the latest are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from threading import Lock
from typing import Any

from torch import Tensor

from vlmprune import ops
from vlmprune.ops.scoring import Scored, Scoring
from vlmprune.ops.selection import Selection

PLANS, WORKSPACE = 64, 256 << 20
"""How many plans are kept, and bytes of their workspaces together."""
OPS: dict[type, tuple[Any, Any]] = {
    Scoring: (ops.prune_tokens, ops.PrunePlan),
    Scored: (ops.prune_scored, ops.ScoredPlan),
}
PLAIN = {int, float, bool, str, type(None)}
"""What is a setting, and no tensor."""
STRIDED = {"query", "key", "lse", "cos", "sin"}
"""What kernels read with strides."""


@dataclass
class Known:
    """Shapes that have come.

    Attributes:
        plan: what runs them; None = they came once, or too long ago.
        turn: of the latest call, counted from the first one on.
    """

    plan: Any = None
    turn: int = 0


class Plans:
    """Runs ``prune_tokens`` and ``prune_scored``: as ops, or as the plans of shapes that have come before.

    A plan owns its workspace, so a second prefill of the same shapes allocates none.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Known] = {}
        self._turns, self._lock = count(), Lock()

    def attempt(self, known: Known, inputs: list[Tensor]) -> ops.Pruned | None:
        """Its plan on these inputs, those of ``RecordedPlan.attempt``; None where it takes others, or is none."""
        plan = known.plan  # another thread may take it away
        if plan is None:
            return None
        known.turn = next(self._turns)
        out: ops.Pruned | None = plan.attempt(inputs)
        return out

    def run(self, key: Any, how: Scoring | Scored, selection: Selection, tensors: list[Tensor]) -> ops.Pruned:
        """The first time that a key comes its call runs as an op, the second time a plan is made of it."""
        known = self.known.get(key)
        if known is None or len(tensors[0]) == 0 or not ops.can_run("prune_plan", tensors[0]):
            self._keep(key, None)
            return call(how, selection, tensors)
        out = self.attempt(known, [*tensors_in((*how, *selection)), *tensors])
        if out is not None:
            return out
        how, selection = _readable(how), _readable(selection)
        inputs = [*tensors_in((*how, *selection)), *tensors]
        out = self.attempt(known, inputs)
        if out is None:
            plan = OPS[type(how)][1](tensors=tensors, **how.keywords(), **selection.keywords())
            self._keep(key, plan)
            out = plan.attempt(inputs)
        assert out is not None
        return out

    def _keep(self, key: Any, plan: Any) -> None:
        """From now on this is what runs such shapes; what was used longest ago goes, if there is no room."""
        with self._lock:
            known = self.known.setdefault(key, Known())
            known.plan, known.turn = plan, next(self._turns)
            while len(self.known) > PLANS or (len(self.known) > 1 and self.nbytes() > WORKSPACE):
                self.known.pop(min(self.known, key=lambda key: self.known[key].turn)).plan = None

    def nbytes(self) -> int:
        """Bytes of all workspaces."""
        return sum(known.plan.nbytes for known in self.known.values() if known.plan is not None)


def call(how: Scoring | Scored, selection: Selection, tensors: list[Tensor]) -> ops.Pruned:
    """Run the op."""
    out: ops.Pruned = OPS[type(how)][0](tensors=tensors, **how.keywords(), **selection.keywords())
    return out


def tensors_in(fields: Iterable[Any]) -> list[Tensor]:
    """Those fields of records that are tensors, in order."""
    return [x for x in fields if type(x) not in PLAIN]


def shapes_of(fields: Iterable[Any]) -> list[Any]:
    """What makes a call another than the last one: settings, and shapes of the tensors."""
    return [x if type(x) in PLAIN else x.shape for x in fields]


def _readable(record: Any) -> Any:
    """A record whose lists and masks lie as the kernels of a plan read them."""
    fields = record._asdict().items()
    lists = {name: x for name, x in fields if type(x) not in PLAIN and name not in STRIDED}
    return record._replace(**{name: x.contiguous() for name, x in lists.items()})
