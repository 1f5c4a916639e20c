"""The documents: every link leads somewhere, and what docs/methods.md says is not here is not."""

import re
from pathlib import Path

import pytest

import vlmprune
from vlmprune.policies.registry import BUILT_IN

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def anchors(page):
    """What GitHub makes of the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", head)).lower() for head in heads]
    return {head.replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: one of {sorted(anchors(target))}"


def tables():
    """By heading of docs/methods.md the names in the first column of its table."""
    sections = re.split(r"^## ", (ROOT / "docs" / "methods.md").read_text(), flags=re.MULTILINE)[1:]
    rows = {
        section.partition("\n")[0]: re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)
        for section in sections
    }
    return {
        head: [name for cell in found for name in cell.split(", ") if name not in ("method", "---")]
        for head, found in rows.items()
    }


def test_what_is_not_here_is_not():
    """A method that is written down moves to the list: its row goes. Parts are left out of those that are there."""
    ours = {
        re.sub(r"\W|_", "", name).lower() for name in (*BUILT_IN, *(c.__name__ for c in BUILT_IN.values()))
    }
    found = tables()
    apart = "Parts that are left out"
    heads = ["With trained parts", "What drops no visual token", "Could not be pinned down", apart]
    assert list(found) == heads
    for head, names in found.items():
        assert names
        there = [name for name in names if re.sub(r"\W|_", "", name).lower() in ours]
        assert there == (names if head == apart else []), f"{head}: {there} are in the registry"


OWN = {"scout"}
"""Methods that no paper has: they say so, and name none."""


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_names_its_paper(name):
    paper = BUILT_IN[name].paper
    assert (paper == "this project") == (name in OWN), paper
    assert name in OWN or re.search(r"arXiv \d{4}\.\d{5}", paper), paper


def test_the_page_on_video_has_every_method_for_it():
    text = (ROOT / "docs" / "video.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert listed == [name for name, kind in BUILT_IN.items() if kind.for_video]


def test_names_of_ours_exist():
    """Ops and policies that docs/methods.md points to."""
    text = (ROOT / "docs" / "methods.md").read_text()
    for op in (
        "merge_tokens",
        "compact_kv",
        "prune_scored",
    ):
        assert f"`{op}`" in text and callable(getattr(vlmprune.ops, op))
    for needs in re.findall(r"Needs\(([^)]*)\)", text):
        eval(f"vlmprune.policies.Needs({needs})")
