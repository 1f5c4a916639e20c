"""What a policy's class docstring says of its settings and of how far it agrees with its sources. One without says nothing."""

from __future__ import annotations

import inspect
import re

from vlmprune.policies.base import PruningPolicy

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Example|Examples):$")
SETTING = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")
SENTENCE = re.compile(r"(?<=[.])\s+(?=[A-Z`])")
TOLD = re.compile(
    r"\b(agree|differ|deviat|compared|checked|identical|side by side|reading|released|authors|the code|the paper|not in the)",
    re.IGNORECASE,
)
"""What a sentence has that speaks of a method's sources."""


def settings_docs(cls: type[PruningPolicy]) -> dict[str, str]:
    """By setting what the "Args" sections of a class and of those it is made from say of it; the nearest one wins."""
    found: dict[str, str] = {}
    for kind in cls.__mro__:
        found = _args(_sections(kind).get("Args", [])) | found
    return found


def agreement(cls: type[PruningPolicy]) -> list[str]:
    """The sentences of a class's docstring, its "Args" aside, that speak of its sources."""
    paragraphs = "\n".join(_sections(cls).get("", [])).split("\n\n")
    sentences = [s for paragraph in paragraphs for s in SENTENCE.split(_plain(paragraph))]
    return [sentence for sentence in sentences if TOLD.search(sentence)]


def _sections(cls: type) -> dict[str, list[str]]:
    """The lines of a class's own docstring by section, "" = the text; none of what ``dataclass`` writes for want of one."""
    doc = cls.__dict__.get("__doc__") or ""
    if doc.startswith(f"{cls.__name__}("):
        return {}
    name = ""
    found: dict[str, list[str]] = {}
    for line in inspect.cleandoc(doc).splitlines():
        head = SECTION.match(line)
        if head is not None:
            name = head[1]
        else:
            found.setdefault(name, []).append(line)
    return found


def _args(lines: list[str]) -> dict[str, str]:
    """By setting its text; two that share one are named with a comma between them."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        head = SETTING.match(line)
        if head is not None:
            names = head[1].split(", ")
        for name in names:
            found[name] = _plain(f"{found.get(name, '')} {line if head is None else head[2]}")
    return found


def _plain(text: str) -> str:
    """On one line, without the marks of code."""
    return " ".join(text.replace("``", "").split())
