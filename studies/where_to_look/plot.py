"""The plot of the study: right answers over the FLOPs cut, one panel a world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.rows import Row, find

from vlmprune.eval.arms import UNPRUNED
from vlmprune.eval.plots import make_figure, to_png
from where_to_look.measure import OURS, RIGHT

WIDTH, HEIGHT = 5.4, 4.6


def draw_plot(rows: Sequence[Row]) -> bytes:
    """A line a method through its budgets, with intervals for Scout: ours thick, packed ones dotted, baselines in grey."""
    some = find(rows, quantity=RIGHT, family="")
    models = list(dict.fromkeys(r.model for r in some))
    figure, panels = make_figure(1, len(models), WIDTH, HEIGHT)
    for panel, model in zip(panels, models, strict=True):
        here = find(some, model=model)
        for method in dict.fromkeys(r.method for r in here if r.method != UNPRUNED):
            _line(panel, sorted(find(here, method=method), key=lambda r: r.budget or 0.0))
        (whole,) = find(here, method=UNPRUNED)
        panel.axhline(whole.mean, color="black", linestyle="--", linewidth=0.7, label=UNPRUNED)
        panel.set_title(f"{model} ({whole.n} questions)", fontsize=9)
        panel.set_xlabel("share of the prefill's FLOPs saved")
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("right answers, all questions")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=6)
    return to_png(figure)


def _line(panel: Any, points: Sequence[Row]) -> None:
    method, cuts, means = points[0].method, [r.budget for r in points], [r.mean for r in points]
    ours = method.startswith(OURS)
    style = {"linewidth": 2.2 if ours else 0.9, "linestyle": ":" if method.endswith("pack") else "-"}
    panel.plot(cuts, means, marker="o" if ours else ".", markersize=4, label=method, **style)
    if ours:
        panel.fill_between(cuts, [r.low for r in points], [r.high for r in points], alpha=0.12)
