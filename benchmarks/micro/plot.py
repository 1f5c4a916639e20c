"""Plots of a CSV of results: per case one panel, per shape the medians of the providers on a logarithmic axis."""

from __future__ import annotations

from pathlib import Path

from .rows import latest, read
from .shapes import DTYPES, SHAPES

COLUMNS = 3
ORDER = [shape.name for shape in SHAPES]
# one colour a provider in every panel
COLORS = ["triton", "cuda", "plan", "reference", "torch", "torch.compile", "eager", "flash-colreduce"]
COLORS += ["scores + topk", "published loop"]


def draw(path: Path, mode: str) -> list[Path]:
    """Write one PNG per dtype and number of rows beside the CSV; return their paths."""
    measured = [row for row in latest(read(path)) if row["mode"] == mode and row["shape"] in ORDER]
    out = []
    for dtype in DTYPES:
        for rows in sorted({int(row["rows"]) for row in measured} - {0}):
            wanted = [r for r in measured if r["dtype"] in (dtype, "fp32") and int(r["rows"]) in (0, rows)]
            if any(r["dtype"] == dtype and int(r["rows"]) == rows for r in wanted):
                target = path.with_name(f"{path.stem}-{mode}-{dtype}-{rows}-rows.png")
                out.append(_figure([r for r in wanted if _belongs(r, dtype)], target, dtype, rows))
    return out


def _belongs(row: dict[str, str], dtype: str) -> bool:
    """select_topk takes float32 scores whatever the model's dtype."""
    return row["dtype"] == dtype or row["case"] == "select_topk"


def _figure(rows: list[dict[str, str]], target: Path, dtype: str, n_rows: int) -> Path:
    import matplotlib.pyplot as plt  # only drawing needs it

    cases = sorted({row["case"] for row in rows})
    height = -(-len(cases) // COLUMNS)
    figure, axes = plt.subplots(height, COLUMNS, figsize=(5 * COLUMNS, 3.4 * height), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    for axis, case in zip(axes.flat, cases, strict=False):
        _panel(axis, [row for row in rows if row["case"] == case])
        axis.set_title(case, fontsize=10)
    first = rows[0]
    versions = f"torch {first['torch']}, triton {first['triton']}, commit {first['commit']}, {first['date']}"
    figure.suptitle(
        f"{first['device']}, {dtype}, {n_rows} scoring rows: median time\n{versions}", fontsize=11
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _panel(axis, rows: list[dict[str, str]]) -> None:
    """One group of bars a shape, and the floor below each group."""
    shapes = [name for name in ORDER if any(row["shape"] == name for row in rows)]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        points = {r["shape"]: float(r["median_us"]) for r in rows if r["provider"] == provider}
        at = [shapes.index(name) + (i + 0.5) * width - 0.4 for name in points]
        axis.bar(at, list(points.values()), width, label=provider, color=f"C{COLORS.index(provider)}")
    for row in rows:
        at = shapes.index(row["shape"])
        axis.hlines(float(row["floor_us"]), at - 0.45, at + 0.45, color="black", linestyle=":")
    axis.set_yscale("log")
    axis.set_ylabel("us (dotted: floor)")
    axis.set_xticks(range(len(shapes)), shapes, fontsize=7, rotation=15)
    axis.legend(fontsize=7)
