"""The pictures of a tuning, as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence

from vlmprune.eval.intervals import Estimate
from vlmprune.eval.plots import make_figure, to_png
from vlmprune.tuning.profile import Profile
from vlmprune.tuning.race import Rung, Standing


def draw_race(rungs: Sequence[Rung]) -> bytes:
    """A line for each candidate: right answers when it was last compared, coloured by how many questions that were."""
    last: dict[str, tuple[int, Standing]] = {}
    for number, rung in enumerate(rungs):
        last |= {one.method: (number, one) for one in rung.standings}
    order = sorted(last.values(), key=lambda pair: (pair[0], pair[1].right.mean))
    figure, (panel,) = make_figure(1, 1, 8.0, 1.2 + 0.22 * len(order))
    for number, rung in enumerate(rungs):
        rows = [(y, one.right) for y, (reached, one) in enumerate(order) if reached == number]
        if rows:
            places, points = zip(*rows, strict=True)
            panel.errorbar(
                [p.mean for p in points],
                places,
                xerr=_ends(points),
                fmt="o",
                markersize=4,
                linewidth=1,
                label=f"{rung.questions} questions",
            )
    panel.axvline(rungs[-1].unpruned.mean, color="black", linestyle="--", linewidth=0.6, label="unpruned")
    panel.set_yticks(range(len(order)), [one.method for _, one in order], fontsize=6)
    panel.set_xlabel("right answers, with 95 % intervals")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=6)
    return to_png(figure)


def draw_profile(profile: Profile) -> bytes:
    """Both shares by layer, and the layer that is recommended."""
    figure, (panel,) = make_figure(1, 1, 5.2, 3.6)
    layers = [row.layer for row in profile.layers]
    for name, points in (
        ("seeks: because of this question about this image", [row.seeks for row in profile.layers]),
        ("moves: differs between questions", [row.moves for row in profile.layers]),
    ):
        panel.errorbar(
            layers,
            [p.mean for p in points],
            yerr=_ends(points),
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
        )
    if profile.recommended is not None:
        panel.axvline(profile.recommended, color="black", linestyle="--", linewidth=0.6)
    panel.set_xticks(layers)
    panel.set_ylim(0, 1)
    panel.set_xlabel("layer of a stage, which reads the layer before")
    panel.set_ylabel("share of the best quarter")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    return to_png(figure)


def _ends(points: Sequence[Estimate]) -> list[list[float]]:
    return [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
