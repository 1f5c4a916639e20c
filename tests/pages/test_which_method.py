"""docs/which_method.md: its table is the study's, what it says to take is a policy, and numbers in its text are measured ones."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

import vlmprune

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "which_method.md").read_text()
WORLDS, FAMILIES, BUDGET = ("glyphworld-576", "glyphworld-576-clutter"), ("box", "read", "count"), "0.83"


def measured() -> dict[tuple[str, ...], tuple[float, ...]]:
    """(world, method, family, budget) -> right answers in percent and their interval."""
    with (ROOT / "studies" / "where_to_look" / "glyphworld.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == "right"]
    return {
        (row["model"], row["method"], row["family"], row["budget"]): tuple(
            100 * float(row[key]) for key in ("mean", "low", "high")
        )
        for row in rows
    }


RIGHT = measured()
TABLE = re.findall(
    r"^\| (.+?) \| (.+) \|$",
    PAGE.split("<!-- table of the study -->")[1].split("<!-- end -->")[0],
    re.MULTILINE,
)[1:]


@pytest.mark.parametrize("method, cells", TABLE, ids=[method for method, _ in TABLE])
def test_the_table_is_the_studys(method, cells):
    budget = "" if method == "unpruned" else BUDGET
    want = ["{:.1f} [{:.1f}, {:.1f}]".format(*RIGHT[world, method, "", budget]) for world in WORLDS]
    for family in FAMILIES:
        want.append(" / ".join(f"{RIGHT[world, method, family, budget][0]:.0f}" for world in WORLDS))
    assert cells.split(" | ") == want


def test_intervals_in_the_text_are_the_studys():
    text = re.sub(r"<!-- table.*?<!-- end -->", "", PAGE, flags=re.DOTALL)
    known = {"{:.1f} [{:.1f}, {:.1f}]".format(*estimate) for estimate in RIGHT.values()}
    said = re.findall(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", text)
    assert said and set(said) <= known


def test_what_it_says_to_take_is_a_policy():
    said = re.findall(r"`([a-z_]+:[^`]+)`", PAGE)
    assert said
    for text in said:
        assert vlmprune.policy_from(text).layers
