"""Which answers are right: boxes by overlap, words without case and spacing."""

import pytest

from vlmprune.eval.scoring import iou, judge, read_box


@pytest.mark.parametrize(
    "answer, truth, right, exact",
    [
        ("it is green", "it is green", True, True),
        ("  It is\n GREEN ", "it is green", True, True),
        ("it is green .", "it is green", False, False),
        ("", "yes", False, False),
        ("9 11 12 14", "9 11 12 14", True, True),
        ("[9, 11, 12, 14]", "9 11 12 14", True, True),
        ("0 0 4 4", "0 0 4 2", True, False),  # exactly one half
        ("0 0 4 4", "0 0 4 1", False, False),
        ("9 11 12", "9 11 12 14", False, False),
        ("green", "9 11 12 14", False, False),
        ("9 11 12 14", "row 3 col 5", False, False),
        ("5 5 5 9", "5 5 5 9", False, True),  # no area: overlaps nothing, though it is the text
    ],
)
def test_scores(answer, truth, right, exact):
    assert judge(answer, truth) == (right, exact)


def test_overlap_counted_by_cells():
    def cells(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    boxes = [(x, y, x + w, y + h) for x in (0, 2) for y in (0, 3) for w in (1, 4) for h in (2, 5)]
    for one in boxes:
        for other in boxes:
            expected = len(cells(one) & cells(other)) / len(cells(one) | cells(other))
            assert iou(one, other) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["1 2 3", "1 2 3 4 5", "a 1 2 3 4", "1.5 2 3 4", ""])
def test_no_box(text):
    assert read_box(text) is None
