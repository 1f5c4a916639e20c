"""Which files of the repository stand on the site, each at its own path: some pages, what these link to, and so on.

Where the tree of pages is the tree of the repository a link leads to the same file on GitHub and here. A source file or a
notebook, which a browser would offer to save, gets a page that shows it, at its path with ".md" behind it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sitepages.dialect import CODE
from sitepages.notebook import notebook_page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)\s]+)(\))|((?:src|href)=\")([^\"]+)(\")")
ADDRESS = re.compile(r"[a-z]+:")
COPIED = {".png", ".webp", ".svg", ".jpg", ".gif", ".csv", ".json", ".jsonl", ".log", ".html"}
"""What is copied as it is: a browser shows it, or one wants to save it."""
LANGUAGES = {
    ".py": "python",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".cu": "cpp",
    ".h": "cpp",
    ".cpp": "cpp",
}


def collect(made: Mapping[str, str], roots: Iterable[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Files of the repository by their paths, and pages for source files by theirs.

    Args:
        made: pages that are no files, by path.
        roots: paths of the pages to begin with.
    """
    files: dict[str, Path] = {}
    sources: dict[str, str] = {}
    todo = [target for path, text in made.items() for target in _targets(path, text)]
    todo += roots
    while todo:
        path = todo.pop()
        path = path if (ROOT / path).is_file() else path.removesuffix(".md")
        file = ROOT / path
        if path in files or f"{path}.md" in sources or not file.is_file():
            continue
        if file.suffix == ".md":
            files[path] = file
            todo += _targets(path, file.read_text())
        elif file.suffix in COPIED:
            files[path] = file
        elif file.suffix == ".ipynb":
            sources[f"{path}.md"] = notebook_page(path, file.read_text())
            todo += _targets(path, sources[f"{path}.md"])
        else:
            sources[f"{path}.md"] = _source(path, file.read_text())
    return files, sources


def retarget(path: str, text: str) -> str:
    """The text of the page at ``path`` with its links to source files and folders leading to the pages of these."""

    def lead(found: re.Match[str]) -> str:
        before, target, behind = found[1] or found[4], found[2] or found[5], found[3] or found[6]
        file, _, anchor = target.partition("#")
        inside = _inside(path, file)
        shown = inside and _page_of(inside)
        if not shown:
            return found[0]
        shown = posixpath.relpath(shown, posixpath.dirname(path) or ".")
        return f"{before}{shown}{f'#{anchor}' if anchor else ''}{behind}"

    parts = CODE.split(text)
    return "".join(part if i % 2 else LINK.sub(lead, part) for i, part in enumerate(parts))


def _targets(path: str, text: str) -> Iterator[str]:
    """Paths in the repository that a page links to."""
    plain = "".join(CODE.split(text)[::2])
    for found in LINK.finditer(plain):
        inside = _inside(path, (found[2] or found[5]).partition("#")[0])
        if inside:
            yield posixpath.join(inside, "README.md") if (ROOT / inside).is_dir() else inside


def _inside(path: str, target: str) -> str:
    """The path in the repository that a link of the page at ``path`` leads to; "" = another address, or the page itself."""
    if not target or ADDRESS.match(target):
        return ""
    inside = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return "" if inside.startswith("..") else inside


def _page_of(inside: str) -> str:
    """The page that shows a file or folder of the repository; "" = it is where the link says."""
    file = ROOT / inside
    if file.is_dir():
        return posixpath.join(inside, "README.md")
    return f"{inside}.md" if file.is_file() and file.suffix not in COPIED | {".md"} else ""


def _source(path: str, text: str) -> str:
    """The page of a source file; the search leaves it out."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    fence = "`" * 4
    head = f"---\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    return f"{head}{fence}{language}\n{text.rstrip()}\n{fence}\n"
