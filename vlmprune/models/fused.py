"""A stage as one fused pass: from the projections of the layer that scores to the rows that survive."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.models.layout import Layout
from vlmprune.models.prefill import Decision, Entering, Rope
from vlmprune.policies.base import PruningPolicy, Ranking
from vlmprune.policies.inputs import Rating

Counts = tuple[int, ...]

PLANS, WORKSPACE = 64, 256 << 20
"""How many plans are kept, and bytes of their workspaces together."""
PLAIN = {int, float, bool, str, type(None)}
"""What is a setting of a plan; anything else is a tensor, or some."""
STRIDED = {"lse", "rope"}
"""What kernels read with strides."""


def why_not(ranking: Ranking | None, entering: Entering, policy: PruningPolicy) -> str | None:
    """Why a stage cannot run as one pass; None if it can."""
    if ranking is None:
        return f"{type(policy).__name__} chooses by itself"
    if entering.predicting is not None:
        return "in training the rows that predict labels stay, whatever their score"
    if entering.layout.end is not None:
        return "candidates of assisted decoding stand behind the prompt"
    return None


@dataclass
class _Known:
    """Shapes that have come.

    Attributes:
        plan: what runs them; None = they came once.
        turn: of the latest call, counted from the first one on.
    """

    plan: Any
    turn: int


class Passes:
    """Runs the fused passes of one policy on one model: as ops, or as the plans of shapes that have come before.

    A plan owns its workspace, so a second prefill of the same shapes allocates none. The latest are kept, one for each
    stream. A copied or saved model starts without any.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, _Known] = {}
        self._turns, self._lock = count(), Lock()

    def __reduce__(self) -> Any:
        return Passes, ()

    def __call__(self, ranking: Ranking, entering: Entering, backend: str) -> tuple[Tensor, Tensor, Decision]:
        """Score, select and gather: rows ``[B, n, D]`` that survive, numbers ``[B, K]`` of the tokens kept, the decision.

        ``backend`` is what runs it: plans are those of one.
        """
        layout, packs = entering.layout, ranking.positions == "pack"
        tensors = [entering.hidden] if packs else [entering.hidden, *entering.rope]
        if layout.origin is not None:
            tensors.append(layout.origin)
        kept = ranking.most(layout.counts)
        real = _rows_left(layout, kept)
        how = ranking.keywords(kept, entering.hidden.device)
        # Shorter samples are padded on the left, so that the last row stays the newest token.
        side = "left" if len(kept) > 1 else "right"
        how["width"], how["padding"], how["newest"] = max(real), side, True
        out = self._run(ranking, entering, tensors, how, backend)
        if ranking.extra is not None:
            out, kept, real = _narrowed(out, layout, side)
        after, rest = _after(layout, kept, real, out)
        # detached: else checkpointed layers would share a graph through them
        rope, shift = entering.packed(after) if packs else (_detached(*rest), entering.shift)
        return out.tensors[0], out.kept, Decision(after, out.index, rope, shift)

    def _run(
        self,
        ranking: Ranking,
        entering: Entering,
        tensors: list[Tensor],
        how: dict[str, Any],
        backend: str,
    ) -> ops.Pruned:
        """One call of ``prune_tokens``, or of ``prune_scored`` where the scores are there."""
        rating, layout = ranking.scores, entering.layout
        op: Any
        plan: Any
        if isinstance(rating, Rating) and rating.seen.group is None:
            by = {"query": rating.seen.query, "key": rating.seen.key}
            how.update(rating.keywords)
            op, plan = ops.prune_tokens, ops.PrunePlan
        else:
            by = {"scores": ranking.scored().contiguous()}  # of all ranks, where several share the heads
            how["columns"], how["key_mask"] = layout.visual, layout.valid
            op, plan = ops.prune_scored, ops.ScoredPlan
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):  # plans have no gradients
            return op(**by, tensors=tensors, **how)
        return self._planned(op, plan, (entering.layer, backend), by, tensors, how)

    def _planned(
        self,
        op: Any,
        kind: Any,
        where: tuple[int, str],
        by: dict[str, Tensor],
        tensors: list[Tensor],
        how: dict[str, Any],
    ) -> ops.Pruned:
        """The first time that shapes come they run as an op, the second time a plan is made of them."""
        settings = [x for x in how.values() if type(x) in PLAIN]
        # kernels of a plan read lists and masks in place
        lists = {k: x if k in STRIDED else x.contiguous() for k, x in how.items() if type(x) not in PLAIN}
        given, hidden = by | lists, tensors[0]
        if "rope" in given:
            given["cos"], given["sin"] = given.pop("rope")
        shapes = [x.shape for x in given.values()]
        stream = torch.cuda.current_stream(hidden.device).cuda_stream if hidden.is_cuda else 0
        key = (*where, stream, *how, *settings, *shapes, hidden.shape, hidden.dtype)
        known, out = self._plans.get(key), None
        if known is not None and known.plan is not None:
            known.turn = next(self._turns)
            out = known.plan.attempt(given, tensors)
        if out is None:
            plan = None
            if known is not None and len(hidden) > 0 and ops.can_run("prune_plan", hidden):
                plan = kind(**by, tensors=tensors, **how | lists)
                out = plan.attempt(given, tensors)
            self._keep(key, plan)
        return op(**by, tensors=tensors, **how) if out is None else out

    def _keep(self, key: Any, plan: Any) -> None:
        """From now on this is what runs such shapes; what was used longest ago goes, if there is no room."""
        with self._lock:
            self._plans[key] = _Known(plan, next(self._turns))
            while len(self._plans) > PLANS or (len(self._plans) > 1 and self._bytes() > WORKSPACE):
                del self._plans[min(self._plans, key=lambda key: self._plans[key].turn)]

    def _bytes(self) -> int:
        return sum(known.plan.nbytes for known in self._plans.values() if known.plan is not None)


def _after(layout: Layout, kept: Counts, real: Counts, out: ops.Pruned) -> tuple[Layout, list[Tensor]]:
    """The layout of what a pass has left, and the tensors it gathered between the rows and their origin."""
    rest = out.tensors[1:]
    full, origin = min(real) == max(real), out.index
    if layout.origin is not None:
        origin = rest.pop() if full else torch.where(out.index >= 0, rest.pop(), -1)
    after = Layout(
        length=max(real),
        visual=out.columns,
        counts=kept,
        real=real,
        valid=None if full else out.index >= 0,
        origin=origin,
        before=(layout, out.kept),
        ordered=layout.ordered,
    )
    return after, rest


def _detached(cos: Tensor, sin: Tensor) -> Rope:
    return (cos.detach(), sin.detach()) if cos.requires_grad or sin.requires_grad else (cos, sin)


def _rows_left(layout: Layout, kept: Counts) -> Counts:
    """Rows of each sample that are no padding, when so many of its visual tokens stay."""
    if len(kept) == 1:
        return (layout.real[0] - layout.counts[0] + kept[0],)
    return tuple(r - c + k for r, c, k in zip(layout.real, layout.counts, kept, strict=True))


def _narrowed(out: ops.Pruned, layout: Layout, side: str) -> tuple[ops.Pruned, Counts, Counts]:
    """What a union really keeps, which only the device knows: one host read, and views of what was gathered."""
    left = tuple(out.count.tolist())
    kept = tuple(n - r + c for n, r, c in zip(left, layout.real, layout.counts, strict=True))
    spare, width = out.index.shape[1] - max(left), max(left)
    rows = slice(None, width) if side == "right" else slice(spare, None)
    columns = out.columns[:, : max(kept)].contiguous()
    if side == "left" and spare:
        columns = torch.where(columns >= 0, columns - spare, -1)
    out = out._replace(
        tensors=[t[:, rows] for t in out.tensors],
        index=out.index[:, rows].contiguous(),
        kept=out.kept[:, : max(kept)],
        columns=columns,
    )
    return out, kept, left
