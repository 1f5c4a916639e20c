"""Whether an answer is right: a box by its overlap with the true one, everything else by its words."""

from __future__ import annotations

import re
from collections.abc import Sequence

Box = tuple[int, int, int, int]
OVERLAP = 0.5
_BOX = re.compile(r"\s*[\[(]?\s*(-?\d+)[\s,]+(-?\d+)[\s,]+(-?\d+)[\s,]+(-?\d+)\s*[\])]?\s*\.?\s*")


def judge(answer: str, truth: str) -> tuple[bool, bool]:
    """``(right, exact)``. Right is IoU >= 0.5 where the truth is a box, else exact; exact ignores case and white space.

    >>> judge("[9, 11, 12, 14]", "9 11 12 14"), judge("0 0 4 4", "0 0 4 2"), judge(" It is GREEN", "it is green")
    ((True, True), (True, False), (True, True))
    """
    exact = " ".join(answer.split()).casefold() == " ".join(truth.split()).casefold()
    box, said = read_box(truth), read_box(answer)
    if box is None:
        return exact, exact
    return said is not None and iou(said, box) >= OVERLAP, exact or said == box


def read_box(text: str) -> Box | None:
    """Four whole numbers ``x1 y1 x2 y2``, with or without commas and brackets; None if the text is anything else.

    >>> read_box("(9, 11, 12, 14)."), read_box("green")
    ((9, 11, 12, 14), None)
    """
    match = _BOX.fullmatch(text)
    if match is None:
        return None
    x1, y1, x2, y2 = map(int, match.groups())
    return x1, y1, x2, y2


def iou(one: Sequence[int], other: Sequence[int]) -> float:
    """Intersection over union of two boxes; 0.0 for a box without area.

    >>> iou((0, 0, 4, 4), (0, 0, 4, 2))
    0.5
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0, width) * max(0, height)
    areas = [max(0, b[2] - b[0]) * max(0, b[3] - b[1]) for b in (one, other)]
    return both / (sum(areas) - both) if both else 0.0
