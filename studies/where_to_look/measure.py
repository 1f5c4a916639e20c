"""From answers to rows: right answers of every method at every budget, and what each Scout gains on each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from common.rows import Row, row

from vlmprune.eval import Answer, Question
from vlmprune.eval.arms import Arm, groups_of
from vlmprune.eval.intervals import bootstrap, proportion
from vlmprune.eval.store import Key
from vlmprune.eval.summary import PerQuestion, answers_of, per_question
from where_to_look.passes import TwoPasses

PART, OURS = "budget", "Scout"
RIGHT, CUT, PREFILL = "right", "cut", "prefill seconds"


def gain_over(method: str) -> str:
    """The quantity of a row that holds a difference to a method."""
    return f"right, minus {method}"


def study_rows(
    model: str, arms: Sequence[Arm], questions: Sequence[Question], answers: Mapping[Key, Answer]
) -> Iterator[Row]:
    """Right answers over all questions and by family, measured FLOPs cut and prefill; then paired differences.

    Several draws of one question are one value, their mean. Every Scout is compared with every other arm of its budget and
    with the unpruned model, question by question.
    """
    groups = groups_of(arms)
    right: dict[tuple[str, float | None], PerQuestion] = {}
    for (method, budget), some in groups.items():
        found = answers_of(some, questions, answers)
        right[method, budget] = per_question(found, lambda answer: answer.right)
        shared = {"model": model, "part": PART, "method": method, "budget": budget}
        for family in ("", *dict.fromkeys(question.family for question in questions)):
            values = [right[method, budget][q.id] for q in questions if family in ("", q.family)]
            note = some[0].key if not family else ""
            yield row(proportion(values), len(values), quantity=RIGHT, family=family, note=note, **shared)
        for quantity, value in ((CUT, lambda a: a.cut), (PREFILL, lambda a: a.prefill)):
            if quantity == PREFILL and isinstance(some[0], TwoPasses):
                continue  # the second pass alone was timed
            values = [*per_question(found, value).values()]
            yield row(bootstrap(values), len(values), quantity=quantity, **shared)
    for ours, other in _pairs(right):
        gains = [right[ours][question.id] - right[other][question.id] for question in questions]
        named = {"model": model, "part": PART, "method": ours[0], "budget": ours[1]}
        yield row(bootstrap(gains), len(gains), quantity=gain_over(other[0]), **named)


def _pairs(
    groups: Mapping[tuple[str, float | None], PerQuestion],
) -> Iterator[tuple[tuple[str, float | None], tuple[str, float | None]]]:
    """Each Scout with all else of its budget, and with the unpruned model."""
    for ours in groups:
        if ours[0].startswith(OURS):
            for other in groups:
                if other != ours and other[1] in (ours[1], None):
                    yield ours, other
