"""The pictures of an evaluation, as PNG bytes: accuracy against cost, accuracy per family, where tokens are kept."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from vlmprune.errors import check
from vlmprune.eval.arms import UNPRUNED
from vlmprune.eval.summary import Result

DPI, COLUMNS = 110, 3
LINE = {"marker": "o", "markersize": 4, "linewidth": 1, "capsize": 2}


def check_matplotlib(command: str = "vlmprune eval") -> None:
    """Raise InputError where the plots could not be drawn; asked before anything slow."""
    there = find_spec("matplotlib") is not None
    check(there, command, "matplotlib (pip install 'vlmprune[plots]')", "no such package")


def draw_pareto(results: Sequence[Result]) -> bytes:
    """Accuracy on all questions against FLOPs and against measured prefill time."""
    figure, (left, right) = make_figure(1, 2, 5.2, 4.2)
    _curves(left, results, lambda result: 1 - result.cut)
    _curves(right, results, lambda result: result.prefill * 1000)
    left.set_xlabel("decoder prefill FLOPs, share of unpruned")
    right.set_xlabel("measured prefill, ms per question")
    left.set_ylabel("right answers, all questions")
    left.legend(fontsize=7)
    return to_png(figure)


def draw_families(results: Sequence[Result]) -> bytes:
    """Accuracy of each family of questions against FLOPs."""
    names = list(results[0].families)
    figure, axes = make_figure(-(-len(names) // COLUMNS), COLUMNS, 3.6, 3.0)
    for panel, name in zip(axes, names, strict=False):
        _curves(panel, results, lambda result: 1 - result.cut, name)
        panel.set_title(f"{name} ({results[0].families[name].questions})", fontsize=9)
    for panel in axes[len(names) :]:
        panel.set_axis_off()
    axes[0].legend(fontsize=6)
    return to_png(figure)


def draw_heat(shares: Mapping[str, Mapping[int, np.ndarray[Any, Any]]]) -> bytes:
    """One line per method: after each stage's layer a map of the patches, the share of the answers that kept each."""
    stages = max((len(share) for share in shares.values()), default=1)
    figure, axes = make_figure(max(len(shares), 1), stages, 2.5, 2.7)
    for panel in axes:
        panel.set_axis_off()
    for line, (title, share) in enumerate(shares.items()):
        for panel, (layer, grid) in zip(axes[line * stages :], share.items(), strict=False):
            panel.imshow(grid, vmin=0, vmax=1, cmap="magma")
            panel.set_title(f"{title}\nfrom layer {layer}: {grid.sum():.0f} of {grid.size}", fontsize=6)
    return to_png(figure)


def make_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its panels, row by row; no global state, unlike pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _curves(
    panel: Any, results: Sequence[Result], cost: Callable[[Result], float], family: str | None = None
) -> None:
    """One line per method through its budgets, with the 95 % intervals; the unpruned model as a dashed line."""
    methods: dict[str, list[Result]] = {}
    for result in results:
        methods.setdefault(result.method, []).append(result)
    for method, some in methods.items():
        some = sorted(some, key=cost)
        points = [(r.all if family is None else r.families[family]).right for r in some]
        ends = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
        look = LINE | ({"color": "black"} if method == UNPRUNED else {})
        panel.errorbar([*map(cost, some)], [p.mean for p in points], yerr=ends, label=method, **look)
        if method == UNPRUNED:
            panel.axhline(points[0].mean, color="black", linestyle="--", linewidth=0.6)
    panel.set_ylim(-0.02, 1.02)
    panel.grid(alpha=0.3)


def to_png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
