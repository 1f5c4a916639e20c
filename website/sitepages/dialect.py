"""GitHub's Markdown as Python-Markdown reads it, so that one file looks the same here and there.

GitHub lets a list or a table follow a paragraph without a blank line, nests lists by the width of their markers, and reads
Markdown inside ``<details>``. Comments are for who edits the file, and pictures from elsewhere would load from there:
no comment and no badge stands on the site, and of another picture its words.
"""

from __future__ import annotations

import re

FENCE = re.compile(r" *(```+|~~~+)")
ITEM = re.compile(r"( *)([-*+]|\d+[.)])( +)(?=\S)")
BULLET_OR_FIRST = re.compile(r" *([-*+]|1[.)]) +\S")
DELIMITER = re.compile(r" *\|?( *:?-+:? *\|)+( *:?-+:? *)?$")
COMMENT = re.compile(r"^ *<!--.*?--> *\n|<!--.*?-->", re.DOTALL | re.MULTILINE)
BADGE = re.compile(r"\[!\[[^\]]*\]\(https?://[^)]*\)\]\([^)]*\)\n?")
PICTURE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)")
CODE = re.compile(r"(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
"""Blocks and spans of code: nothing in them is Markdown."""


def outside_code(text: str, change: re.Pattern[str], by: str) -> str:
    """``text`` with what matches replaced, but for code."""
    parts = CODE.split(text)
    return "".join(part if i % 2 else change.sub(by, part) for i, part in enumerate(parts))


def without_guests(text: str) -> str:
    """A page without comments and badges, and words for pictures from elsewhere."""
    for guest, words in ((COMMENT, ""), (BADGE, ""), (PICTURE, r"\1")):
        text = outside_code(text, guest, words)
    return text


def to_python_markdown(text: str) -> str:
    """A page as GitHub reads it, written for Python-Markdown."""
    text = without_guests(text)
    text = text.replace("<details>", '<details markdown="1">')
    return "\n".join(_spaced(text.splitlines())) + "\n"


def _spaced(lines: list[str]) -> list[str]:
    """Blank lines before lists and tables, and four spaces for every level of a list."""
    out: list[str] = []
    levels: list[int] = []  # of the open items, the column at which their text begins
    fence = ""
    for i, line in enumerate(lines):
        mark = FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) else fence
            out.append(_shifted(line, levels))
            continue
        item = ITEM.match(line)
        levels = _open(levels, line, item, behind_blank=not out or not out[-1].strip())
        if _begins(lines, i, item, bool(levels)) and out and out[-1].strip():
            out.append("")
        out.append(_shifted(line, levels))
        if item is not None:
            levels.append(item.end())
        fence = mark[1] if mark else ""
    return out


def _open(levels: list[int], line: str, item: re.Match[str] | None, behind_blank: bool) -> list[int]:
    """The items that a line stands in; one that goes on with a paragraph may be indented less."""
    if not line.strip() or (item is None and not behind_blank):
        return levels
    indent = len(line) - len(line.lstrip())
    return [column for column in levels if column <= indent]


def _begins(lines: list[str], i: int, item: re.Match[str] | None, inside: bool) -> bool:
    """Whether a list or a table begins here, where the line before may be one of a paragraph."""
    before = lines[i - 1] if i else ""
    if item is not None:
        return not inside and not ITEM.match(before) and bool(BULLET_OR_FIRST.match(lines[i]))
    table = "|" in lines[i] and i + 1 < len(lines) and DELIMITER.match(lines[i + 1])
    return bool(table) and not before.lstrip().startswith("|")


def _shifted(line: str, levels: list[int]) -> str:
    """The line, four spaces in for every item it stands in."""
    if not levels or not line.strip():
        return line
    indent = len(line) - len(line.lstrip())
    return " " * (4 * len(levels) + max(indent - levels[-1], 0)) + line.lstrip()
