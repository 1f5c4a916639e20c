"""Sheets of small pictures for the gallery: one method on several questions, and all methods on one. PIL only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from vlmprune.policies.base import Grid
from vlmprune.view.picture import GAP, INK, PAPER, dim_dropped

RIGHT, WRONG = (26, 127, 55), (207, 34, 46)
LINE, EDGE = 18, 3
LARGE, SMALL, ACROSS = 192, 96, 4


@dataclass(frozen=True)
class Frame:
    """A picture with what was kept of it.

    Attributes:
        image: as the model sees it.
        grid: rows and columns of its tokens.
        kept: numbers (raster order) of those that are left.
        tokens: how many that are, as text.
        over: whether the run as a whole cost more than its budget.
        answer: the model's.
        right: whether it is true; the colour of the edge.
    """

    image: Image.Image
    grid: Grid
    kept: frozenset[int]
    tokens: str
    over: bool
    answer: str
    right: bool

    def drawn(self, side: int) -> Image.Image:
        """The dimmed picture ``side`` pixels wide in its edge."""
        dimmed = dim_dropped(self.image, self.grid, set(self.kept))
        inner = dimmed.resize((side - 2 * EDGE, side - 2 * EDGE), Image.Resampling.LANCZOS)
        out = Image.new("RGB", (side, side), RIGHT if self.right else WRONG)
        out.paste(inner, (EDGE, EDGE))
        return out

    @property
    def said(self) -> str:
        """The answer and, for whoever cannot tell the colours apart, a sign."""
        return f"{'right' if self.right else 'wrong'}: {self.answer}"


def strip(prompts: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[Frame]]) -> Image.Image:
    """One method: a row a question, a column a budget; below every picture what the last stage leaves, and the answer."""
    step = LARGE + 3 * LINE + GAP
    sheet, pen = _sheet(GAP + len(heads) * (LARGE + GAP), GAP + LINE + len(rows) * step)
    for j, head in enumerate(heads):
        _write(pen, (GAP + j * (LARGE + GAP), GAP), head, 15)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        top = GAP + LINE + i * step
        _write(pen, (GAP, top), prompt, 14)
        for j, frame in enumerate(row):
            left = GAP + j * (LARGE + GAP)
            sheet.paste(frame.drawn(LARGE), (left, top + LINE))
            _write(pen, (left, top + LINE + LARGE + 1), frame.tokens, 12)
            _write(pen, (left, top + 2 * LINE + LARGE - 3), frame.said, 12, frame.right)
    return sheet


def contact_sheet(
    title: str, heads: Sequence[str], unpruned: Frame, methods: Mapping[str, Sequence[Frame]]
) -> Image.Image:
    """All methods on one question, ``ACROSS`` in a row: name, and a small picture for each of ``heads``, the budgets."""
    width = len(heads) * (SMALL + 4) + GAP
    lines = -(-len(methods) // ACROSS)
    head, step = LARGE // 2 + 2 * LINE, SMALL + 2 * LINE + GAP
    sheet, pen = _sheet(GAP + ACROSS * width, 2 * GAP + head + lines * step)
    sheet.paste(unpruned.drawn(head), (GAP, GAP))
    left = 2 * GAP + head
    _write(pen, (left, GAP), title, 16)
    _write(pen, (left, GAP + LINE + 8), f"unpruned, {unpruned.tokens} tokens: {unpruned.said}", 14)
    told = f"below, each method at a mean of {' / '.join(heads)} visual tokens over the layers; "
    _write(pen, (left, GAP + 2 * LINE + 12), told + "edge: green = right, red = wrong answer", 14)
    _write(pen, (left, GAP + 3 * LINE + 12), "* its first layers alone cost more than that", 14)
    for i, (name, frames) in enumerate(methods.items()):
        x, y = GAP + i % ACROSS * width, 2 * GAP + head + i // ACROSS * step
        _write(pen, (x, y), name, 15)
        for j, frame in enumerate(frames):
            sheet.paste(frame.drawn(SMALL), (x + j * (SMALL + 4), y + LINE + 3))
            words = f"{'ok' if frame.right else 'x'} {len(frame.kept)}{'*' * frame.over}"
            _write(pen, (x + j * (SMALL + 4), y + LINE + SMALL + 4), words, 11, frame.right)
    return sheet


def _sheet(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, height), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, right: bool | None = None
) -> None:
    """Text; of an answer in the colour of its edge."""
    ink = INK if right is None else RIGHT if right else WRONG
    pen.text(at, text, fill=ink, font=ImageFont.load_default(size))
