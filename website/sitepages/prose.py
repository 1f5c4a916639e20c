"""Docstrings and other texts of the package as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Example|Examples):$", re.MULTILINE)
SENTENCE = re.compile(r"(?<=[.])\s+(?=[A-Z`])")
TERM = re.compile(r"^ {4}([\w ]+):(?= )", re.MULTILINE)
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5}(?:v\d+)?)")
GITHUB = re.compile(r"github\.com/[\w-]+/[\w.-]+")


def head_and_rest(cls: type, sentences: int = 3) -> tuple[str, list[str]]:
    """What a class's own docstring says: its first sentences, and the paragraphs behind them; no section such as "Args".

    The head ends with the first paragraph, however short that is.
    """
    doc = SECTION.split(inspect.cleandoc(cls.__dict__["__doc__"]))[0]
    first, *others = (marked(paragraph) for paragraph in doc.strip().split("\n\n"))
    said = SENTENCE.split(first)
    more = " ".join(said[sentences:])
    return " ".join(said[:sentences]), [*([more] if more else []), *others]


def marked(text: str) -> str:
    """A docstring's paragraph in Markdown: one mark of code for two, and indented terms as a list."""
    return TERM.sub(r"- *\1*:", text.replace("``", "`"))


def literal(text: str) -> str:
    """A plain text that holds no Markdown, so that none is read in it."""
    return re.sub(r"([\\*_<\[\]`])", r"\\\1", text)


def rows(heads: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table.

    Raises:
        ValueError: a cell of several lines, which would end the table.
    """
    lines = [list(heads), ["---"] * len(heads), *map(list, cells)]
    broken = [cell for line in lines for cell in line if "\n" in cell]
    if broken:
        raise ValueError(f"cells: expected one line each, got {broken[0]!r}")
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def linked_papers(paper: str) -> str:
    """A method's sources with links to arXiv."""
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def sources(paper: str) -> str:
    """A method's sources, one an item, with links to arXiv and to code."""
    linked = GITHUB.sub(r"[\g<0>](https://\g<0>)", linked_papers(literal(paper)))
    return "\n".join(f"- {source}" for source in linked.split("; "))
