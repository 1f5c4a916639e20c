"""From answers to rows: accuracy at equal FLOPs, accuracy layer by layer, and where in the image each method keeps tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from common.rows import Row, row

from vlmprune.eval import Answer, Estimate, Question
from vlmprune.eval.arms import UNPRUNED, Arm, groups_of
from vlmprune.eval.intervals import bootstrap, proportion
from vlmprune.eval.scoring import iou, read_box
from vlmprune.eval.store import Key
from vlmprune.eval.summary import answers_of, kept_marks, per_question
from vlmprune.policies.base import Grid

from .heights import kept_heights, row_profile, thirds

Answers = Mapping[Key, Answer]


def overlap(answer: str, truth: str) -> float:
    """Intersection over union of the box that was said with the true one; 0 for what is no box."""
    said, box = read_box(answer), read_box(truth)
    return iou(said, box) if said and box else 0.0


def accuracy_rows(
    part: str,
    model: str,
    arms: Sequence[Arm],
    questions: Sequence[Question],
    answers: Answers,
    against: Sequence[str],
) -> Iterator[Row]:
    """Right answers, mean IoU of boxes, FLOPs cut and tokens of every method; differences to the methods ``against``.

    Those are beginnings of method names; a difference is taken question by question, at the same budget.
    """
    groups = groups_of(arms)
    for (method, budget), some in groups.items():
        policy = some[0].policy
        named = {"model": model, "part": part, "method": method, "budget": budget}
        named["layer"] = None if policy is None else policy.layers[0]
        for family in dict.fromkeys(question.family for question in questions):
            asked = [question for question in questions if question.family == family]
            found = answers_of(some, asked, answers)
            for quantity, values in _values(found, asked).items():
                estimate = proportion(values) if quantity == "right" else bootstrap(values)
                note = some[0].key if quantity == "right" else ""
                yield row(estimate, len(asked), family=family, quantity=quantity, note=note, **named)
            for base, others in groups.items():
                if base[1] == budget and base[0] != method and base[0].startswith(tuple(against)):
                    other = answers_of(others, asked, answers)
                    quantity = f"right, minus {base[0]}"
                    yield row(difference(found, other), len(asked), family=family, quantity=quantity, **named)


def difference(one: Sequence[Answer], other: Sequence[Answer]) -> Estimate:
    """Right answers of one method minus those of another, on the same questions."""
    first, second = (per_question(some, lambda answer: answer.right) for some in (one, other))
    return bootstrap([value - second[question] for question, value in first.items()])


def kept_rows(
    model: str, arms: Sequence[Arm], questions: Sequence[Question], answers: Answers, grid: Grid
) -> Iterator[Row]:
    """Share of kept tokens in each third of the image and their mean height, after each stage of every method."""
    unbiased = {name: f"{where.mean():.4f} of all patches" for name, where in thirds(grid).items()}
    for (method, budget), some in groups_of(arms).items():
        if method == UNPRUNED:
            continue
        found = answers_of(some, questions, answers)
        for layer, kept in stages_of(found, grid).items():
            named = {"model": model, "part": "kept", "method": method, "budget": budget, "layer": layer}
            for quantity, values in kept_heights(kept, grid).items():
                # Several draws of one question are not independent questions: their mean is one value.
                values = values.reshape(len(some), -1).mean(0)
                note = unbiased.get(quantity, "0.5 is the middle")
                yield row(bootstrap(values.tolist()), len(questions), quantity=quantity, note=note, **named)


def stages_of(answers: Sequence[Answer], grid: Grid) -> dict[int, np.ndarray]:
    """Layer of each stage -> marks ``[answers, patches]`` bool of what was kept there."""
    size = grid[0] * grid[1]
    layers = [layer for layer, _ in answers[0].kept]
    return {
        layer: np.stack([kept_marks(answer.kept[i][1], size) for answer in answers]).astype(bool)
        for i, layer in enumerate(layers)
    }


def profiles(
    arms: Sequence[Arm], questions: Sequence[Question], answers: Answers, grid: Grid, budget: float
) -> dict[str, np.ndarray]:
    """Method -> share of its kept tokens in each row of the image, after its first stage."""
    out = {}
    for (method, cut), some in groups_of(arms).items():
        if cut == budget:
            kept = stages_of(answers_of(some, questions, answers), grid)
            out[method] = row_profile(kept[min(kept)], grid)
    return out


def _values(found: Sequence[Answer], asked: Sequence[Question]) -> dict[str, list[float]]:
    """Quantity -> one value a question."""
    truth = {question.id: question.answer for question in asked}
    measured = {
        "right": per_question(found, lambda answer: answer.right),
        "cut": per_question(found, lambda answer: answer.cut),
        "tokens, mean over layers": per_question(found, lambda answer: answer.tokens),
    }
    if all(read_box(answer) for answer in truth.values()):
        measured["IoU"] = per_question(found, lambda answer: overlap(answer.answer, truth[answer.question]))
    return {quantity: [*values.values()] for quantity, values in measured.items()}
