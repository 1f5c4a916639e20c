"""The plot of the study: right answers over the FLOPs cut, one panel a world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.rows import Row, find

from vlmprune.eval.arms import ORACLE, SMALLER, UNPRUNED
from vlmprune.eval.plots import make_figure, to_png
from where_to_look.arms import LATTICE, RANDOM
from where_to_look.measure import OURS, RIGHT
from where_to_look.scouts import ABLATED

WIDTH, HEIGHT = 5.4, 5.2
PACKED, EARLY, KEPT = ", pack", ", early", ", keep"
GREYS = {LATTICE: "0.2", RANDOM: "0.4", SMALLER: "0.6", ORACLE: "0.75"}


def draw_plot(rows: Sequence[Row]) -> bytes:
    """A line a method through its budgets: Scout thick with its intervals, baselines in grey, ablations left out.

    So are methods that were asked at one budget alone, where no line is.

    A published method has one colour: dotted with packed positions, dashed at early layers.
    """
    whole_rows = [r for r in find(rows, quantity=RIGHT, family="") if not r.method.startswith(ABLATED)]
    budgets: dict[str, set[float | None]] = {}
    for r in whole_rows:
        budgets.setdefault(r.method, set()).add(r.budget)
    shown = [r for r in whole_rows if r.method == UNPRUNED or len(budgets[r.method]) > 1]
    models = list(dict.fromkeys(r.model for r in shown))
    figure, panels = make_figure(1, len(models), WIDTH, HEIGHT)
    colours = _colours(shown)
    for panel, model in zip(panels, models, strict=True):
        here = find(shown, model=model)
        for method in dict.fromkeys(r.method for r in here if r.method != UNPRUNED):
            _line(panel, sorted(find(here, method=method), key=lambda r: r.budget or 0.0), colours)
        (whole,) = find(here, method=UNPRUNED)
        panel.axhline(whole.mean, color="black", linestyle="--", linewidth=0.7, label=UNPRUNED)
        panel.set_title(f"{model} ({whole.n} questions)", fontsize=9)
        panel.set_xlabel("share of the prefill's FLOPs saved")
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("right answers, all questions")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return to_png(figure)


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """By method without its variants."""
    from matplotlib import colormaps

    names = dict.fromkeys(_plain(r.method) for r in rows if r.method != UNPRUNED)
    colours = iter([*colormaps["tab10"].colors, *colormaps["Dark2"].colors])
    return {name: GREYS.get(name) or next(colours) for name in names}


def _plain(method: str) -> str:
    """The name without what is said of layers and positions."""
    return method.removesuffix(PACKED).removesuffix(KEPT).removesuffix(EARLY)


def _line(panel: Any, points: Sequence[Row], colours: dict[str, Any]) -> None:
    method, cuts, means = points[0].method, [r.budget for r in points], [r.mean for r in points]
    ours, name = method.startswith(OURS), _plain(method)
    line = ":" if method.endswith(PACKED) else "--" if EARLY in method else "-"
    label = name if line == "-" else None  # the legend has each method once
    style = {"color": colours[name], "linestyle": line, "linewidth": 2.4 if ours else 1.0}
    panel.plot(cuts, means, marker="o" if ours else ".", markersize=4, label=label, **style)
    if ours:
        low, high = [r.low for r in points], [r.high for r in points]
        panel.fill_between(cuts, low, high, color=colours[name], alpha=0.12)
