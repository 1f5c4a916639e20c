"""Successive halving: all candidates answer a few questions, the better part of them as many more, and so on."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmprune.errors import check
from vlmprune.eval.arms import UNPRUNED, Arm
from vlmprune.eval.ask import Subject, ask_all, missing
from vlmprune.eval.intervals import Estimate, bootstrap, proportion
from vlmprune.eval.questions import Question
from vlmprune.eval.store import Answer, Store
from vlmprune.progress import Progress

SLACK = 0.01
"""How far the cut that was measured may stay behind the budget: prompts are not all as long as the typical one."""


@dataclass(frozen=True)
class Standing:
    """One candidate after one rung.

    Attributes:
        method: as typed.
        policy: what it was fitted to, as ``Arm.key``.
        right: share of right answers to all questions so far.
        to_best: mean difference to the best of the rung, question by question; of the best itself 0.
        cut: mean share of the decoder's prefill FLOPs saved.
        stays: whether it goes on, or, in the last rung, is the best.
    """

    method: str
    policy: str
    right: Estimate
    to_best: Estimate
    cut: float
    stays: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"right": self.right._asdict(), "to_best": self.to_best._asdict()}


@dataclass(frozen=True)
class Rung:
    """How all that took part stand, best first.

    Attributes:
        questions: answered by each, with those of the rungs before.
        unpruned: share of right answers of the unpruned model to the same.
        standings: one each.
    """

    questions: int
    unpruned: Estimate
    standings: tuple[Standing, ...]


def race(
    subject: Subject,
    arms: Sequence[Arm],
    parts: Sequence[Sequence[Question]],
    one_in: int,
    store: Store,
    left_out: dict[str, str],
    progress: Progress,
) -> Iterator[Rung]:
    """Every rung once it is run. The best of ``one_in`` candidates go on, two at least; of equals those named first.

    One that saves less than its budget, as unions may, does not take part in the comparison: ``left_out`` says so.

    Args:
        arms: the candidates.
        parts: what is asked in each rung; every answer so far counts.
        one_in: 2 = the better half stays, 3 = the best third.
        store: where answers are, and go.
        left_out: by method why it was left out.
        progress: told which rung is asked, how many answers it has, and of how many.

    Raises:
        InputError: no candidate saves what it should.
    """
    arms = list(arms)
    for number, part in enumerate(parts):
        ask(
            subject,
            [Arm(UNPRUNED), *arms],
            part,
            number,
            store,
            progress,
            f"rung {number + 1} of {len(parts)}",
        )
        arms = _cheap(arms, parts[: number + 1], store, left_out)
        last = number == len(parts) - 1
        stay = 1 if last else max(2, -(-len(arms) // one_in))
        rung, order = _rung(arms, parts[: number + 1], stay, store)
        yield rung
        arms = [arms[i] for i in order[:stay]]


def ask(
    subject: Subject,
    arms: Sequence[Arm],
    part: Sequence[Question],
    number: int,
    store: Store,
    progress: Progress,
    doing: str,
) -> None:
    """Ask what the store does not have. The rung's number is the seed: what draws, draws anew in each."""
    seeded = [replace(arm, seed=number) for arm in arms]
    total = missing(part, seeded, store)
    progress(doing, 0, total)
    for done, _ in enumerate(ask_all(subject, part, seeded, store), 1):
        progress(doing, done, total)


def answers_to(arm: Arm, parts: Sequence[Sequence[Question]], store: Store) -> list[Answer]:
    """Those of one arm to what the rungs so far asked."""
    return [store.answers[arm.key, question.id, n] for n, part in enumerate(parts) for question in part]


def split(asked: Sequence[Question], first: int, seed: int) -> list[list[Question]]:
    """What each rung asks: ``first`` questions, as many more, twice as many, ...; every family spread over all rungs.

    A last part that were smaller than ``first`` joins the one before.
    """
    draw, families = random.Random(seed), dict[str, list[Question]]()
    for question in asked:
        families.setdefault(question.family, []).append(question)
    places = []
    for some in families.values():
        some = draw.sample(some, len(some))
        offset = draw.random()
        places += [((i + offset) / len(some), question) for i, question in enumerate(some)]
    order = [question for _, question in sorted(places, key=lambda place: place[0])]
    parts, start, end = [], 0, first
    while start < len(order):
        end = end if len(order) - end >= first else len(order)
        parts.append(order[start:end])
        start, end = end, 2 * end
    return parts


def _cheap(
    arms: Sequence[Arm], parts: Sequence[Sequence[Question]], store: Store, left_out: dict[str, str]
) -> list[Arm]:
    """The arms that cost what they may."""
    cheap = []
    for arm in arms:
        cut = statistics.fmean(answer.cut for answer in answers_to(arm, parts, store))
        if arm.budget is None or cut >= arm.budget - SLACK:
            cheap.append(arm)
        else:
            left_out[arm.method] = f"budget: expected a cut of {arm.budget:.1%}, got {cut:.1%} when it ran"
    check(bool(cheap), "policy", "one that saves the budget when it runs", "; ".join(left_out.values()))
    return cheap


def _rung(
    arms: Sequence[Arm], parts: Sequence[Sequence[Question]], stay: int, store: Store
) -> tuple[Rung, list[int]]:
    """Standings, and the order of the arms in them."""
    answers = [answers_to(arm, parts, store) for arm in arms]
    rights = [[float(answer.right) for answer in some] for some in answers]
    order = sorted(range(len(arms)), key=lambda i: (-statistics.fmean(rights[i]), i))
    best = rights[order[0]]
    standings = tuple(
        Standing(
            method=arms[i].method,
            policy=arms[i].key,
            right=proportion(rights[i]),
            to_best=bootstrap([a - b for a, b in zip(rights[i], best, strict=True)]),
            cut=statistics.fmean(answer.cut for answer in answers[i]),
            stays=place < stay,
        )
        for place, i in enumerate(order)
    )
    whole = proportion([float(answer.right) for answer in answers_to(Arm(UNPRUNED), parts, store)])
    return Rung(len(best), whole, standings), order
