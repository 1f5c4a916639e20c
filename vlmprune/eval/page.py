"""One HTML file that says everything: tables, pictures inside it, no script, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vlmprune.eval.intervals import Estimate
from vlmprune.eval.summary import NEAR, Accuracy, Result

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #ddd; padding: .3em .7em; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
small { color: #666; } img { max-width: 100%; } code { font-size: 12px; }
"""
NOTES = f"""
Right: a box overlaps the true one with IoU &ge; 0.5; every other answer equals the true one but for case and white
space. In brackets 95&nbsp;% intervals: Wilson's for one draw, the bootstrap over questions for several draws and for
differences, which are taken question by question. Uniform is the baseline of the nearest FLOPs cut, if that is within
{NEAR:g}. FLOPs are the decoder's prefill, 2 x multiply-adds from shapes, each question by itself; time is the measured
prefill of a batch with selection divided by its questions, the median. Neither counts the vision tower. Smaller: nothing
is pruned, and the picture is made smaller to at most as many tokens as the cut leaves (the cut says how near); its tower works
less, too.
"""


def make_page(settings: Mapping[str, Any], results: Sequence[Result], pictures: Mapping[str, bytes]) -> str:
    """The whole page. ``pictures`` are PNGs by heading."""
    families = list(results[0].families)
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>vlmprune eval</title>",
        f"<style>{STYLE}</style><h1>vlmprune eval</h1>",
        _table(("setting", "value"), settings.items()),
        f"<h2>Accuracy at equal cost</h2><p>{NOTES}</p>",
        _table(HEADS, map(summary_cells, results)),
        "<h2>Right answers by family</h2>",
        _table((*NAMES, *families), (family_cells(result, True) for result in results)),
        *(
            f"<h2>{escape(title)}</h2><img src='data:image/png;base64,{base64.b64encode(png).decode()}' alt=''>"
            for title, png in pictures.items()
        ),
        "<h2>Policies as they ran</h2>",
        _table(SETTINGS, map(settings_cells, results)),
        "</html>",
    ]
    return "\n".join(parts)


NAMES = ("method", "FLOPs cut")
HEADS = (*NAMES, "prefill ms", "right", "to unpruned", "to uniform")
SETTINGS = (*NAMES, "budget", "tokens, mean over layers", "draws", "policy")


def summary_cells(result: Result) -> tuple[str, ...]:
    """One row of the main table, under ``HEADS``."""
    cell = result.all
    differences = (points(cell.to_unpruned), points(cell.to_uniform))
    return (*_name(result), f"{result.prefill * 1000:.2f}", percent(cell.right), *differences)


def settings_cells(result: Result) -> tuple[object, ...]:
    """One row of the table of policies, under ``SETTINGS``."""
    budget = "-" if result.budget is None else f"{result.budget:.1%}"
    return (*_name(result), budget, f"{result.tokens:.1f}", result.seeds, result.policy)


def family_cells(result: Result, intervals: bool = False) -> tuple[str, ...]:
    """One row of the table of families: right answers in percent, and exact ones where those are fewer."""
    return (*_name(result), *(_family_cell(cell, intervals) for cell in result.families.values()))


def percent(value: Estimate) -> str:
    """A share and its interval, in percent."""
    return f"{value.mean * 100:.1f} [{value.low * 100:.1f}, {value.high * 100:.1f}]"


def points(value: Estimate | None) -> str:
    """A difference and its interval, in percentage points."""
    if value is None:
        return "-"
    mean, low, high = (round(v * 100, 1) + 0.0 for v in value)  # + 0.0: no minus before a zero
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _name(result: Result) -> tuple[str, str]:
    return result.method, f"{result.cut:.1%}"


def _family_cell(cell: Accuracy, intervals: bool) -> str:
    right = percent(cell.right) if intervals else f"{cell.right.mean * 100:.1f}"
    same = abs(cell.exact - cell.right.mean) < 1e-9
    return right if same else f"{right} (exact {cell.exact * 100:.1f})"


def _table(heads: Sequence[object], rows: Any) -> str:
    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", heads) + "".join(line("td", row) for row in rows) + "</table>"
