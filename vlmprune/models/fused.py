"""A stage as one fused pass: from the projections of the layer that scores to the rows that survive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.models.graphs.reads import HostRead
from vlmprune.models.layout import Layout
from vlmprune.models.plans import PLANS, Known, Plans, call, shapes_of, tensors_in
from vlmprune.models.prefill import Decision, Entering, Rope
from vlmprune.ops.scoring import Scored, Scoring
from vlmprune.ops.selection import Selection
from vlmprune.policies.base import AttentionInputs, Ranking
from vlmprune.policies.inputs import Rating

Counts = tuple[int, ...]
Passed = tuple[Tensor, Tensor | None, Decision | None]
"""Rows ``[B, n, D]`` that survive, numbers ``[B, K]`` of the tokens kept, the decision; None where all are."""

read = attrgetter("query", "key", "last", "rows", "columns", "key_mask", "lse")


def why_not(entering: Entering) -> str | None:
    """Why a stage that ranks cannot run as one pass; None if it can."""
    if entering.predicting is not None:
        return "in training the rows that predict labels stay, whatever their score"
    if entering.layout.end is not None:
        return "candidates of assisted decoding stand behind the prompt"
    return None


class Case(NamedTuple):
    """A stage of one prompt.

    Attributes:
        entering: what enters it.
        seen: the attention that is read for it, or None.
        facts: the numbers that the policy would be shown besides.
        path: what the report says of it: which backend runs it.
    """

    entering: Entering
    seen: AttentionInputs | None
    facts: tuple[Any, ...]
    path: str


class _Static(NamedTuple):
    """A pass that another prompt can have without its policy being asked.

    Attributes:
        known: what has its plan.
        take: picks what the plan takes of what a prompt offers, and of the constants behind that.
        constants: tensors that all prompts share.
        kept: how many tokens of each sample stay.
        packs, narrows: whether positions are packed, and whether how many stay is known only when they are chosen.
    """

    known: Known
    take: Callable[[Sequence[Any]], tuple[Tensor, ...]]
    constants: tuple[Tensor, ...]
    kept: Counts
    packs: bool
    narrows: bool


class Passes:
    """Runs the fused passes of one policy on one model, on plans of its own. A copied or saved model starts without any."""

    def __init__(self) -> None:
        self.plans = Plans()
        self._static: dict[Any, _Static] = {}

    def __reduce__(self) -> Any:
        return Passes, ()

    def again(self, case: Case) -> Passed | None:
        """The pass of a static ranking, for a prompt like one before it; None where there was none."""
        entering = case.entering
        static = self._static.get(_kind(case))
        if static is None or _learns(entering) or why_not(entering) is not None:
            return None
        inputs = static.take((*_offered(case), *static.constants))
        out = self.plans.attempt(static.known, [*inputs, *_shortened(entering, static.packs)])
        return None if out is None else _passed(out, entering, static.kept, static.packs, static.narrows)

    def __call__(self, ranking: Ranking, case: Case) -> Passed:
        """Score, select and gather by this ranking."""
        entering, layout = case.entering, case.entering.layout
        packs, narrows = ranking.positions == "pack", ranking.extra is not None
        kept = ranking.most(layout.counts)
        # Shorter samples are padded on the left, so that the last row stays the newest token.
        width, left = max(_rows_left(layout, kept)), len(kept) > 1 and not layout.bound
        selection = ranking.selection(kept, entering.hidden.device, width, True, left)
        rating, tensors = ranking.scores, _shortened(entering, packs)
        how: Scoring | Scored
        if isinstance(rating, Rating) and rating.group is None:
            how = rating.scoring
            if rating.apart:
                selection = selection._replace(at=layout.visual, at_mask=layout.valid)
        else:  # of all ranks, where several share the heads
            how = Scored(ranking.scored(), layout.visual, layout.valid, layout.length)
        if _learns(entering):  # plans have no gradients
            out = call(how, selection, tensors)
        else:
            key = (*_where(case), *shapes_of((*how, *selection)))
            out = self.plans.run(key, how, selection, tensors)
            known = self.plans.known.get(key)  # another thread may have needed the room
            taken = _taken(ranking, how, selection, _offered(case)) if ranking.static else None
            if taken is not None and known is not None:
                self._remember(_kind(case), _Static(known, *taken, kept, packs, narrows))
        return _passed(out, entering, kept, packs, narrows)

    def _remember(self, kind: Any, static: _Static) -> None:
        if len(self._static) >= PLANS:
            self._static.clear()
        self._static[kind] = static


def _where(case: Case) -> tuple[Any, ...]:
    """What runs a pass, and on rows of which shape."""
    hidden = case.entering.hidden
    stream = torch.cuda.current_stream(hidden.device).cuda_stream if hidden.is_cuda else 0
    return case.entering.layer, case.path, stream, hidden.shape, hidden.dtype


def _kind(case: Case) -> tuple[Any, ...]:
    """All that a policy is shown but for what is in tensors: of one kind a static ranking is the same."""
    layout, seen = case.entering.layout, case.seen
    numbers = (*_where(case), layout.counts, layout.real, layout.ordered, case.facts)
    if seen is None:
        return numbers
    given = seen.key_mask is None, seen.lse is None, seen.scale, seen.rope[0].shape
    return *numbers, *given, seen.query.shape, seen.key.shape, seen.rows.shape


def _offered(case: Case) -> tuple[Tensor | None, ...]:
    """What every prompt brings to a pass."""
    layout, seen = case.entering.layout, case.seen
    lists = layout.visual, layout.valid
    return lists if seen is None else (*lists, *seen.rope, *read(seen))


def _taken(
    ranking: Ranking, how: Scoring | Scored, selection: Selection, offered: tuple[Any, ...]
) -> tuple[Callable[[Sequence[Any]], tuple[Tensor, ...]], tuple[Tensor, ...]] | None:
    """What picks the tensors of a static ranking from what is offered and from constants, and those.

    None where scoring takes one that was made for this prompt.
    """
    known = {id(x) for x in offered}
    if isinstance(ranking.scores, Rating) and any(id(x) not in known for x in tensors_in(how)):
        return None
    inputs = tensors_in((*how, *selection))
    constants = tuple(x for x in inputs if id(x) not in known)
    places = {id(x): at for at, x in enumerate((*offered, *constants))}
    return itemgetter(*[places[id(x)] for x in inputs]), constants


def _learns(entering: Entering) -> bool:
    """Whether gradients flow through what gets shorter."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (entering.hidden, *entering.rope))


def _shortened(entering: Entering, packs: bool) -> list[Tensor]:
    """What gets shorter: the rows, their rotary tables where these stay theirs, where they come from."""
    origin = entering.layout.origin
    tables = () if packs else entering.rope
    return [entering.hidden, *tables] if origin is None else [entering.hidden, *tables, origin]


def _passed(out: ops.Pruned, entering: Entering, kept: Counts, packs: bool, narrows: bool) -> Passed:
    """What a pass has left."""
    layout = entering.layout
    real = _rows_left(layout, kept)
    if narrows:
        if layout.bound:
            raise HostRead("how many stay is known when they are chosen")
        out, kept, real = _narrowed(out, layout, len(kept) > 1)
    after, rest = _after(layout, kept, real, out)
    # detached: else checkpointed layers would share a graph through them
    rope, shift = entering.packed(after) if packs else (_detached(*rest), entering.shift)
    return out.tensors[0], out.kept, Decision(after, out.index, rope, shift)


def _after(layout: Layout, kept: Counts, real: Counts, out: ops.Pruned) -> tuple[Layout, list[Tensor]]:
    """The layout of what a pass has left, and the tensors it gathered between the rows and their origin."""
    rest = out.tensors[1:]
    full, origin = min(real) == max(real) and not layout.bound, out.index
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
        bound=layout.bound,
    )
    return after, rest


def _detached(cos: Tensor, sin: Tensor) -> Rope:
    return (cos.detach(), sin.detach()) if cos.requires_grad or sin.requires_grad else (cos, sin)


def _rows_left(layout: Layout, kept: Counts) -> Counts:
    """Rows of each sample that are no padding, when so many of its visual tokens stay."""
    if len(kept) == 1:
        return (layout.real[0] - layout.counts[0] + kept[0],)
    return tuple(r - c + k for r, c, k in zip(layout.real, layout.counts, kept, strict=True))


def _narrowed(out: ops.Pruned, layout: Layout, left: bool) -> tuple[ops.Pruned, Counts, Counts]:
    """What a union really keeps, which only the device knows: one host read, and views of what was gathered."""
    real = tuple(out.count.tolist())
    kept = tuple(n - r + c for n, r, c in zip(real, layout.real, layout.counts, strict=True))
    spare, width = out.index.shape[1] - max(real), max(real)
    rows = slice(spare, None) if left else slice(None, width)
    columns = out.columns[:, : max(kept)].contiguous()
    if left and spare:
        columns = torch.where(columns >= 0, columns - spare, -1)
    out = out._replace(
        tensors=[t[:, rows] for t in out.tensors],
        index=out.index[:, rows].contiguous(),
        kept=out.kept[:, : max(kept)],
        columns=columns,
    )
    return out, kept, real
