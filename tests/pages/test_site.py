"""The docs site: it builds without a warning, every link leads somewhere, nothing comes from the network, no page is missing.

Built once, with a small gallery in the place of the drawn one.
"""

import json
import logging
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="the site is built in .venv-pages: make test-pages")

from markdown_it import MarkdownIt
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from vlmprune import ops
from vlmprune.cli.facts import fields_of
from vlmprune.policies.registry import BUILT_IN

ROOT = Path(__file__).parents[2]
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}
"""Tags whose file a browser fetches by itself."""
SILENT = {"script", "style", "svg", "title"}
COUNTED = (
    "li",
    "tr",
    "td",
    "th",
    "pre",
    "code",
    "em",
    "strong",
    "del",
    "a",
    "img",
    "summary",
    *(f"h{i}" for i in range(1, 7)),
)
METHOD_SECTIONS = [
    "What it keeps",
    "Formula",
    "Use it",
    "Settings",
    "Schedule",
    "Published budgets",
    "How far it was checked",
    "From",
]


class Seen(HTMLParser):
    """A page as it is read: anchors, links, files that are fetched, and in its article the tags and the text."""

    def __init__(self, text, article=False):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.fetched, self.tags, self.heads = set(), [], [], Counter(), []
        self.words, self._inside, self._silent, self._head, self._left_out = [], not article, 0, None, 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADS and given.get(LOADS[tag]) and given.get("rel") not in ("prev", "next"):
            self.fetched.append(given[LOADS[tag]])
        self._inside |= tag == "article"
        self._silent += tag in SILENT
        if "headerlink" in given.get("class", ""):
            self._left_out = 1
        elif self._inside:
            self.tags[tag] += 1
            if re.fullmatch("h[1-6]", tag):
                self._head = []

    def handle_endtag(self, tag):
        self._silent -= tag in SILENT
        if tag == "a" and self._left_out:
            self._left_out = 0
        if self._head is not None and re.fullmatch("h[1-6]", tag):
            self.heads.append("".join(self._head).strip())
            self._head = None
        self._inside &= tag != "article"

    def handle_data(self, data):
        if self._inside and not self._silent and not self._left_out:
            self.words.append(data)
            if self._head is not None:
                self._head.append(data)

    @property
    def text(self):
        """Without spaces, which no reader of Markdown keeps."""
        return re.sub(r"\s", "", "".join(self.words))


def build_site(gallery, out):
    """Build it, and give back what mkdocs has to say against it; strictly, it then ends in an error."""
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out))
    config.extra["gallery"] = str(gallery)
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        build(config)
    except Abort:
        assert said
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    return said


@pytest.fixture(scope="session")
def site(gallery, tmp_path_factory):
    """The built site: its folder, every page of it, and what mkdocs had to say."""
    out = tmp_path_factory.mktemp("site")
    said = build_site(gallery, out)
    pages = {str(path.relative_to(out)): Seen(path.read_text(), article=True) for path in out.rglob("*.html")}
    return out, pages, said


def page(site, path):
    """The page of a Markdown file."""
    found = re.sub(r"README\.html$", "index.html", re.sub(r"\.md$", ".html", path))
    return site[1][found]


def test_it_builds_without_a_warning(site):
    assert not site[2]


def test_links_lead_somewhere(site):
    out, pages, _ = site
    wrong = []
    for name, seen in pages.items():
        for link in (*seen.links, *seen.fetched):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (out / name).parent / unquote(parts.path) if parts.path else out / name
            target = target / "index.html" if target.is_dir() else target
            there = target.is_file()
            if there and parts.fragment and target.suffix == ".html" and name != "404.html":
                there = unquote(parts.fragment) in pages[str(target.resolve().relative_to(out.resolve()))].ids
            if not there and name != "404.html":  # whose links are made for the root of a server
                wrong.append(f"{name}: {link}")
    assert not wrong, "\n".join(wrong)


def test_nothing_comes_from_the_network(site):
    out, pages, _ = site
    for name, seen in pages.items():
        assert not [link for link in seen.fetched if urlsplit(link).netloc], name
    for sheet in out.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text()), sheet


def test_every_page_of_the_repository_is_there(site, sitepages):
    """Those below docs/ are in the navigation too, where one looks."""
    shown = {link for seen in site[1].values() for link in seen.links}
    navigation, made = (ROOT / "mkdocs.yml").read_text(), (sitepages.methods.INDEX, sitepages.ops.INDEX)
    for file in sorted((ROOT / "docs").glob("*.md")):
        path = str(file.relative_to(ROOT))
        assert page(site, path).heads
        assert f"- {path}\n" in navigation or path in made, f"{path}: expected it in mkdocs.yml"
    for path in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "studies/README.md",
        "examples/serving/README.md",
    ):
        assert page(site, path).heads, path
    assert any(link.endswith("policies/methods/fastv.py.html") for link in shown)


def mirrored(sitepages):
    files, _ = sitepages.tree.collect(
        {}, ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
    )
    return {path: file for path, file in files.items() if path.endswith(".md")}


def test_markdown_is_read_as_on_github(site, sitepages, gallery):
    """Text, and how many lists, cells, headings, code and links there are. Comments and pictures from elsewhere stay away."""
    github = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    drawn = json.loads((gallery / "gallery.json").read_text())
    for path, file in mirrored(sitepages).items():
        text = file.read_text()
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # of a Space
        if path == sitepages.methods.INDEX:
            text = sitepages.methods.with_own_table(text, drawn)
        expected, got = Seen(github.render(sitepages.dialect.without_guests(text))), page(site, path)
        assert got.text == expected.text, f"{path}: {_first_difference(expected.text, got.text)}"
        linked = len(re.findall(r"^\| `\w+` \|", text, re.MULTILINE)) if path == sitepages.ops.INDEX else 0
        for tag in COUNTED:
            more = got.tags[tag] - expected.tags[tag]
            assert more == 0 or (tag == "a" and 0 < more <= linked), f"{path}: {more} more of <{tag}>"


def _first_difference(expected, got):
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
    return f"expected {expected[at - 30 : at + 50]!r}, got {got[at - 30 : at + 50]!r}"


@pytest.mark.parametrize("name", BUILT_IN)
def test_method_page(name, site, gallery):
    cls = BUILT_IN[name]
    seen = page(site, f"methods/{name}.md")
    assert seen.heads[0] == cls.__name__
    assert [head for head in seen.heads[1:] if head != "In detail"] == METHOD_SECTIONS
    assert re.sub(r"\s", "", cls.formula) in seen.text
    assert (
        (f"{name}.webp" in seen.fetched) == (gallery / f"{name}.webp").is_file() != ("Nopicture" in seen.text)
    )
    for setting in fields_of(cls):
        assert setting in seen.text
    for number in re.findall(r"arXiv ([\w.]+\d)", cls.paper):
        assert f"https://arxiv.org/abs/{number}" in seen.links
    assert seen.tags["pre"] >= 2 and "vlmprune.prune(model," in seen.text
    assert f"../{cls.__module__.replace('.', '/')}.py.html" in seen.links


def test_page_of_all_methods(site, sitepages):
    seen = page(site, sitepages.methods.INDEX)
    assert {f"../methods/{name}.html" for name in BUILT_IN} <= set(seen.links)
    assert "../methods/sheet.webp" in seen.fetched
    assert seen.tags["tr"] == 1 + len(BUILT_IN)
    with pytest.raises(ValueError, match="expected one table"):
        sitepages.methods.with_own_table("# Policies", {"left_out": []})


@pytest.mark.parametrize("name", ops.__all__)
def test_op_page(name, site, sitepages):
    seen = page(site, sitepages.ops.page_of(name))
    assert name in seen.heads and ">>>" in seen.text
    assert name in sitepages.ops.HELPERS or seen.heads[-3:] == ["Backends", "Reached from", "Specification"]
    assert (
        f"../{sitepages.ops.page_of(name)}".replace(".md", ".html")
        in page(site, "reference/vlmprune.ops.md").links
    )


@pytest.mark.parametrize("name", ["start", "new_method"])
def test_notebooks_are_pages(name, site):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    seen = page(site, f"notebooks/{name}.ipynb.md")
    assert seen.tags["pre"] >= sum(cell["cell_type"] == "code" for cell in cells) > 3
    assert seen.tags["img"] >= 2 and f"notebooks/{name}.ipynb.html" in page(site, "README.md").links


def test_a_cell_is_one_line(sitepages):
    assert sitepages.method.rows(("a",), [("b|c",)]) == "| a |\n| --- |\n| b\\|c |"
    with pytest.raises(ValueError, match="expected one line each"):
        sitepages.method.rows(("a",), [("b\nc",)])


def test_a_notebook_shows_no_other_output(sitepages):
    cell = {
        "cell_type": "code",
        "source": ["a"],
        "outputs": [{"output_type": "display_data", "data": {"text/html": ["b"]}}],
    }
    with pytest.raises(ValueError, match="expected a picture, Markdown or text, got text/html"):
        sitepages.tree.notebook_page("a.ipynb", json.dumps({"cells": [cell]}))


def test_the_table_of_ops_is_complete(sitepages):
    rows = [name for name, *_ in sitepages.ops.ROW.findall((ROOT / "docs" / "ops.md").read_text())]
    classes = ["PrunePlan", "ScoredPlan", *sitepages.ops.HELPERS]
    assert sorted(rows) == sorted(set(ops.__all__) - set(classes))


def test_reference_has_every_public_name(site, sitepages):
    for module in sitepages.reference.modules():
        seen = page(site, f"reference/{module}.md")
        for name in sitepages.reference.names_of(module):
            told = f"{module}.{name}" in seen.ids or name in seen.text
            assert told, f"{module}.{name}"


def test_search_knows_every_kind_of_page(site):
    out, _, _ = site
    found = json.loads((out / "search" / "search_index.json").read_text())["docs"]
    places = {one["location"].partition("#")[0] for one in found}
    assert {
        "docs/start.html",
        "methods/fastv.html",
        "ops/select_topk.html",
        "reference/vlmprune.html",
    } <= places
    assert not [place for place in places if place.endswith(".py.html")]


def test_without_a_gallery_it_says_what_is_missing(tmp_path):
    (said,) = build_site(tmp_path, tmp_path / "site")
    assert "extra.gallery: expected a folder of `vlmprune gallery`" in said
