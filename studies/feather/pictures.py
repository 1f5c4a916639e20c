"""The two pictures of the study as PNG bytes: in which rows tokens are kept, and what RoPE does to the score."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from common.rows import Row, find
from matplotlib.figure import Figure
from PIL import Image

from .rope import BOTTOM, RECALL

DPI = 100


def draw_profiles(profiles: Mapping[str, np.ndarray]) -> bytes:
    """The vertical histogram: per method, the share of its kept tokens in each row of the image, top row on top."""
    figure = Figure(figsize=(1.75 * len(profiles), 3.0), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(profiles), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (method, shares) in zip(panels, profiles.items(), strict=True):
        panel.barh(range(len(shares)), shares, height=1.0, color="0.45")
        panel.axvline(1 / len(shares), color="C3", linewidth=0.8)
        panel.set_title(method.replace(":", "\n").replace(",", "\n"), fontsize=7)
        panel.tick_params(labelsize=6)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("row of the image", fontsize=7)
    figure.supxlabel("share of the kept tokens (red: if evenly spread)", fontsize=7)
    return _png(figure)


def draw_rope(rows: Sequence[Row]) -> bytes:
    """Per model: what the bottom third gets of the best quarter at every layer; and the recall of the box, if measured."""
    panels = [
        (model, quantity)
        for quantity in (BOTTOM, RECALL)
        for model in dict.fromkeys(r.model for r in rows)
        if find(rows, part="rope", model=model, quantity=quantity)
    ]
    figure = Figure(figsize=(3.3 * len(panels), 2.7), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (model, quantity) in zip(axes, panels, strict=True):
        for method, color in (("with RoPE", "C3"), ("without", "C0")):
            some = find(rows, part="rope", model=model, quantity=quantity, method=method)
            layers = [r.layer for r in some]
            panel.plot(layers, [r.mean for r in some], color=color, marker=".", label=method)
            panel.fill_between(layers, [r.low for r in some], [r.high for r in some], color=color, alpha=0.25)
        unbiased = float(some[0].note.partition(" ")[0])
        panel.axhline(unbiased, color="black", linestyle="--", linewidth=0.7, label="unbiased")
        panel.set_title(f"{model}\n{quantity}", fontsize=7)
        panel.set_xlabel("decoder layer", fontsize=7)
        panel.tick_params(labelsize=6)
        panel.set_ylim(0, 1)
    axes[0].legend(fontsize=6)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    """With a small palette: a third of the bytes, and nothing to be seen of it."""
    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(out, format="png", optimize=True)
    return out.getvalue()
