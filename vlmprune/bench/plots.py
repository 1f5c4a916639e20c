"""The pictures of a benchmark, as PNG bytes: speed-ups beside what FLOPs and roofline say, and throughput against the batch size."""

from __future__ import annotations

from collections.abc import Sequence

from vlmprune.bench.rows import Row
from vlmprune.eval.plots import make_figure, to_png

SHOWN = ("prefill", "decode", "total")


def draw_speedups(rows: Sequence[Row]) -> bytes:
    """Of each phase at the first batch size: the measured speed-up with its 20th and 80th percentile, and the two ratios."""
    some = [row for row in rows if row.batch == rows[0].batch and row.speedup]
    figure, axes = make_figure(1, len(SHOWN), 5.0, 1.2 + 0.45 * len(some))
    names = [row.arm for row in some]
    for panel, phase in zip(axes, SHOWN, strict=True):
        there = [(i, row) for i, row in enumerate(some) if phase in row.speedup]
        gains = [row.speedup[phase] for _, row in there]
        ends = [[g.median - g.p20 for g in gains], [g.p80 - g.median for g in gains]]
        places = [i for i, _ in there]
        panel.barh(
            places, [g.median for g in gains], xerr=ends, color="tab:blue", height=0.5, label="measured"
        )
        for marks, ratio, color in (("|", "flops", "black"), ("d", "roofline", "tab:red")):
            known = [(i, getattr(row, ratio)[phase]) for i, row in there if phase in getattr(row, ratio)]
            spots = [value for _, value in known]
            panel.plot(spots, [i for i, _ in known], marks, color=color, markersize=9, label=f"{ratio} ratio")
        panel.set_yticks(range(len(names)), names if phase == SHOWN[0] else [""] * len(names), fontsize=7)
        panel.set_xlabel(f"{phase}: times as fast as unpruned")
        panel.axvline(1, color="grey", linewidth=0.6)
        panel.grid(axis="x", alpha=0.3)
        panel.invert_yaxis()
    axes[0].legend(fontsize=6)
    return to_png(figure)


def draw_throughput(rows: Sequence[Row]) -> bytes:
    """New tokens per second against the batch size, a line an arm."""
    figure, (panel,) = make_figure(1, 1, 6.0, 4.2)
    for name in dict.fromkeys(row.arm for row in rows if row.seconds):
        points = [(row.batch, row.tokens_per_second) for row in rows if row.arm == name and row.seconds]
        panel.plot(*zip(*points, strict=True), marker="o", linewidth=1, label=name)
    panel.set_xlabel("prompts at once")
    panel.set_ylabel("new tokens per second, everything included")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=6)
    return to_png(figure)
