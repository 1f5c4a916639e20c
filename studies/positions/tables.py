"""From answers to rows, and from rows to the tables of the README."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from common.methods import KEEP, PACK
from common.rows import Row, find, row
from common.tables import NONE, gain, markdown

from vlmprune.eval import Answer, Question
from vlmprune.eval.arms import UNPRUNED, Arm
from vlmprune.eval.intervals import bootstrap, proportion
from vlmprune.eval.page import percent
from vlmprune.eval.store import Key
from vlmprune.eval.summary import answers_of

DIFFERENCE, ALL = "keep minus pack", "mean over budgets"
"""What the rows of differences are called, and those of them that are a mean."""
Values = dict[str, float]


def make_rows(
    model: str, arms: Sequence[Arm], questions: Sequence[Question], answers: Mapping[Key, Answer]
) -> Iterator[Row]:
    """Right answers of every arm and the differences within pairs, over all questions (family "") and in each family.

    A method with several budgets also has the difference's mean over them, question by question.
    """
    families = ["", *dict.fromkeys(question.family for question in questions)]
    asked = {f: [q.id for q in questions if f in ("", q.family)] for f in families}
    right: dict[tuple[str, str, float | None], Values] = {}
    apart: dict[str, dict[float | None, Values]] = {}
    for arm in arms:
        method, _, part = (UNPRUNED, "", "") if arm.policy is None else arm.method.rpartition(" ")
        found = answers_of([arm], questions, answers)
        right[method, part, arm.budget] = {a.question: float(a.right) for a in found}
        note = f"cut {fmean(a.cut for a in found):.4f}, {arm.key}"
        for family, ids in asked.items():
            values = [right[method, part, arm.budget][i] for i in ids]
            named = dict(model=model, part=part, method=method, budget=arm.budget)
            yield row(proportion(values), len(ids), family=family, quantity="right", note=note, **named)
    for (method, part, budget), kept in right.items():
        if part == KEEP:
            packed = right[method, PACK, budget]
            apart.setdefault(method, {})[budget] = {i: kept[i] - packed[i] for i in kept}
    for method, budgets in apart.items():
        for budget, values in budgets.items():
            yield from _differences(model, method, budget, values, asked)
        if len(budgets) > 1:
            mean = {i: fmean(values[i] for values in budgets.values()) for i in asked[""]}
            yield from _differences(model, method, None, mean, asked, ALL)


def _differences(
    model: str,
    method: str,
    budget: float | None,
    values: Values,
    asked: Mapping[str, Sequence[str]],
    note: str = "",
) -> Iterator[Row]:
    for family, ids in asked.items():
        estimate = bootstrap([values[i] for i in ids])
        named = dict(model=model, part=DIFFERENCE, method=method, budget=budget, note=note)
        yield row(estimate, len(ids), family=family, quantity="right", **named)


def tables(rows: Sequence[Row]) -> str:
    """Two Markdown tables a model: right answers of each pair at every budget, and what keeping gains by family."""
    parts = []
    for model in dict.fromkeys(r.model for r in rows):
        here = find(rows, model=model)
        (whole,) = find(here, method=UNPRUNED, family="")
        parts += [f"**{model}**: {whole.n} questions, unpruned {percent(whole.estimate)}", _by_budget(here)]
        parts.append(_by_family(here))
    return "\n\n".join(parts)


def _by_budget(rows: Sequence[Row]) -> str:
    """Packed -> kept and their difference."""
    budgets = list(dict.fromkeys(r.budget for r in rows if r.budget is not None))
    head, lines = ["method", *(f"{budget:.0%} cut" for budget in budgets), "mean of the differences"], []
    for method in dict.fromkeys(r.method for r in rows if r.part == DIFFERENCE):
        mine = find(rows, method=method, family="")
        cells = [_pair(find(mine, budget=budget)) for budget in budgets]
        over = find(mine, part=DIFFERENCE, budget=None)
        if find(mine, part=KEEP, budget=None):  # a method without a budget
            cut = find(mine, part=KEEP)[0].note.split(",")[0]
            lines.append([f"`{method}` ({cut})", *cells, _pair(find(mine, budget=None))])
        else:
            only = over or find(mine, part=DIFFERENCE)
            lines.append([f"`{method}`", *cells, gain(only[0].estimate)])
    return markdown(head, lines)


def _by_family(rows: Sequence[Row]) -> str:
    """The difference in each family, mean over the budgets."""
    families = list(dict.fromkeys(r.family for r in rows if r.family))
    lines = []
    for method in dict.fromkeys(r.method for r in rows if r.part == DIFFERENCE):
        mine = find(rows, method=method, part=DIFFERENCE)
        mine = find(mine, budget=None) or mine
        lines.append([f"`{method}`", *(gain(find(mine, family=f)[0].estimate) for f in families)])
    return markdown(["keep minus pack", *families], lines)


def _pair(rows: Sequence[Row]) -> str:
    """A cell, ``-`` where the budget cannot be met."""
    if not rows:
        return NONE
    kept, packed, apart = (find(rows, part=part)[0] for part in (KEEP, PACK, DIFFERENCE))
    return f"{100 * packed.mean:.1f} -> {100 * kept.mean:.1f}: {gain(apart.estimate)}"
