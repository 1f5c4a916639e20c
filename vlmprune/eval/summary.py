"""Turns answers into results: accuracy with intervals, the difference to the baselines, cost, and where tokens were kept."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune.eval.arms import UNPRUNED, Arm, groups_of
from vlmprune.eval.intervals import Estimate, bootstrap, proportion
from vlmprune.eval.questions import Question
from vlmprune.eval.store import Answer, Key
from vlmprune.policies.base import Grid
from vlmprune.policies.methods.uniform import Uniform

NEAR = 0.05
"""How far apart the FLOPs cuts of a method and of the uniform baseline may be for a comparison."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on some questions: a value per question is its mean over seeds.

    Attributes:
        questions: how many.
        right: share of right answers.
        exact: share of exact answers.
        to_unpruned, to_uniform: mean difference on the same questions, or None where there is nothing to compare with.
    """

    questions: int
    right: Estimate
    exact: float
    to_unpruned: Estimate | None = None
    to_uniform: Estimate | None = None


@dataclass(frozen=True)
class Result:
    """One method at one budget, over all its seeds.

    Attributes:
        method, budget: as in ``Arm``.
        policy: the policy with all its settings.
        seeds: how many draws.
        cut: mean share of the decoder's prefill FLOPs saved.
        tokens: visual tokens, mean over layers and questions.
        prefill: median seconds of the prefill per question.
        all: accuracy on all questions.
        families: accuracy on each family.
    """

    method: str
    budget: float | None
    policy: str
    seeds: int
    cut: float
    tokens: float
    prefill: float
    all: Accuracy
    families: Mapping[str, Accuracy]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an estimate is ``{mean, low, high}``."""
        families = {name: _plain(accuracy) for name, accuracy in self.families.items()}
        rest = {k: v for k, v in vars(self).items() if k not in ("all", "families")}
        return {**rest, "all": _plain(self.all), "families": families}


PerQuestion = dict[str, float]
"""Question id -> mean of a value over its seeds; of being right, the share of seeds that were."""


def summarize(
    questions: Sequence[Question], arms: Sequence[Arm], answers: Mapping[Key, Answer]
) -> list[Result]:
    """One result per method and budget, in the order of the arms; every question must be answered."""
    groups = groups_of(arms)
    found = {group: answers_of(some, questions, answers) for group, some in groups.items()}
    rights = {group: per_question(some, lambda answer: answer.right) for group, some in found.items()}
    cuts = {group: statistics.fmean(a.cut for a in some) for group, some in found.items()}
    orders = {g: p.order for g, some in groups.items() if isinstance(p := some[0].policy, Uniform)}
    uniform = sorted(orders, key=lambda group: orders[group] == "raster")  # of two as near, the lattice
    families: dict[str, list[str]] = {}
    for question in questions:
        families.setdefault(question.family, []).append(question.id)
    results = []
    for group, some in groups.items():
        exact = per_question(found[group], lambda answer: answer.exact)
        near = min(uniform, key=lambda other: abs(cuts[other] - cuts[group]), default=group)
        close = near != group and abs(cuts[near] - cuts[group]) <= NEAR
        unpruned = None if group == (UNPRUNED, None) else rights[UNPRUNED, None]
        told = (rights[group], exact, unpruned, rights[near] if close else None)
        results.append(
            Result(
                method=group[0],
                budget=group[1],
                policy=some[0].key,
                seeds=len(some),
                cut=cuts[group],
                tokens=statistics.fmean(a.tokens for a in found[group]),
                prefill=statistics.median(a.prefill for a in found[group]),
                all=_accuracy([question.id for question in questions], *told),
                families={name: _accuracy(ids, *told) for name, ids in sorted(families.items())},
            )
        )
    return results


def answers_of(
    arms: Sequence[Arm], questions: Sequence[Question], answers: Mapping[Key, Answer]
) -> list[Answer]:
    """The answers of some arms to these questions."""
    return [answers[arm.key, question.id, arm.seed] for arm in arms for question in questions]


def per_question(answers: Sequence[Answer], value: Callable[[Answer], float]) -> PerQuestion:
    """The mean over seeds of a value of each answer, in the order in which questions first come."""
    values: dict[str, list[float]] = {}
    for answer in answers:
        values.setdefault(answer.question, []).append(float(value(answer)))
    return {question: statistics.fmean(some) for question, some in values.items()}


def kept_share(answers: Sequence[Answer], grid: Grid) -> dict[int, np.ndarray[Any, Any]]:
    """Layer of each stage -> ``[rows, columns]`` float64, the share of these answers that kept each patch."""
    size = grid[0] * grid[1]
    totals: dict[int, np.ndarray[Any, Any]] = {}
    for answer in answers:
        for layer, bits in answer.kept:
            totals[layer] = totals.get(layer, np.zeros(size)) + kept_marks(bits, size)
    return {layer: (total / len(answers)).reshape(grid) for layer, total in sorted(totals.items())}


def kept_marks(bits: str, size: int) -> np.ndarray[Any, Any]:
    """What one stage kept, as an answer holds it: ``[size]`` uint8, 1 for every one of ``size`` patches that is there."""
    packed = np.frombuffer(int(bits, 16).to_bytes(-(-size // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little")[:size]


def _accuracy(
    ids: Sequence[str], right: PerQuestion, exact: PerQuestion, *bases: PerQuestion | None
) -> Accuracy:
    """Accuracy on some questions, and the difference to each base."""
    differences = (base if base is None else bootstrap([right[i] - base[i] for i in ids]) for base in bases)
    estimate = proportion([right[i] for i in ids])
    return Accuracy(len(ids), estimate, statistics.fmean(exact[i] for i in ids), *differences)


def _plain(accuracy: Accuracy) -> dict[str, Any]:
    """With its estimates as dictionaries."""
    return {k: v._asdict() if isinstance(v, Estimate) else v for k, v in vars(accuracy).items()}
