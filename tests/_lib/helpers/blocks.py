"""Code blocks of Markdown pages, with what stands in a comment on the line before: whether and how a test runs them.

``<!-- not run: REASON -->``
``<!-- given: model, inputs -->`` names that the page takes for granted, as it says in words
``<!-- run with 70101:70103 for 70101:70201 -->`` fewer of what takes long
"""

import re
from dataclasses import dataclass, replace

BLOCK = re.compile(
    r"(?P<notes>(?:^ *<!-- .*? -->\n)*)^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
NOTE = re.compile(r"<!-- (not run: |given: |run with )(.*?) -->")


@dataclass(frozen=True)
class Block:
    """One of them.

    Attributes:
        page: the page's path.
        line: of the page, of its first line of code.
        language: behind the fence.
        text: the code, without the indentation of the fence.
        reason: why it is not run; "" = it is.
        given: names that are there.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str = ""
    given: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"


def read_blocks(page: str, markdown: str) -> list[Block]:
    """All of a page, in order."""
    found = []
    for match in BLOCK.finditer(markdown):
        line = markdown.count("\n", 0, match.start("text")) + 1
        indent = len(match["indent"])
        text = "".join(
            one[indent:] if one.strip() else one for one in match["text"].splitlines(keepends=True)
        )
        block = Block(page, line, match["language"].strip(), text)
        for kind, told in NOTE.findall(match["notes"]):
            block = _noted(block, kind, told)
        found.append(block)
    return found


def _noted(block: Block, kind: str, told: str) -> Block:
    if kind == "not run: ":
        return replace(block, reason=told)
    if kind == "given: ":
        return replace(block, given=tuple(told.split(", ")))
    text = block.text
    for change in told.split(", "):
        fewer, _, written = change.partition(" for ")
        assert written and written in text, f"{block.where}: expected {written!r} in the block"
        text = text.replace(written, fewer)
    return replace(block, text=text)
