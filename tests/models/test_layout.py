"""Row bookkeeping against plain Python lists, on random batches."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.models.choice import settle
from vlmprune.models.layout import open_layout, shorten, spread, take, where_true
from vlmprune.policies import Reduction

PAD, TEXT, VISUAL = "p", "t", "v"


@st.composite
def batches(draw):
    """Samples as strings of t and v, padded left or right with p."""
    batch = draw(st.integers(1, 4))
    rows = [draw(st.text(alphabet="tv", min_size=1, max_size=12)) for _ in range(batch)]
    width = max(map(len, rows))
    side = draw(st.sampled_from(["left", "right"]))
    return [r.rjust(width, PAD) if side == "left" else r.ljust(width, PAD) for r in rows], draw(
        st.integers(0, 2**16)
    )


def padded(lists: list[list[int]]) -> torch.Tensor:
    width = max(map(len, lists))
    return torch.tensor([row + [-1] * (width - len(row)) for row in lists]).reshape(len(lists), width)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_three_stages_equal_lists(case):
    rows, seed = case
    rng = random.Random(seed)
    visual = torch.tensor([[c == VISUAL for c in row] for row in rows])
    padding = torch.tensor([[c != PAD for c in row] for row in rows])
    layout = open_layout(visual, None if padding.all() else padding, None)
    # the slow model: every sample is a list of (position in the prompt, kind), padding left out
    lists = [[(i, c) for i, c in enumerate(row) if c != PAD] for row in rows]
    for _ in range(3):
        images = [[x for x in sample if x[1] == VISUAL] for sample in lists]
        assert layout.counts == tuple(map(len, images))
        kept = [sorted(rng.sample(range(len(v)), rng.randint(min(1, len(v)), len(v)))) for v in images]
        index = padded(kept)
        layout, survivors = shorten(layout, index, tuple(map(len, kept)))
        lists = [
            [x for x in sample if x[1] == TEXT or x in [v[i] for i in k]]
            for sample, v, k in zip(lists, images, kept, strict=True)
        ]
        width = max(map(len, lists))
        want = [[-1] * (width - len(sample)) + [i for i, _ in sample] for sample in lists]
        assert layout.origin.tolist() == want
        assert survivors.shape == layout.origin.shape
        assert layout.length == width
        positions = padded([[i for i, c in sample if c == VISUAL] for sample in lists])
        assert layout.positions.tolist() == positions.tolist()
        if layout.valid is None:
            assert all(len(sample) == width for sample in lists)
        else:
            assert torch.equal(layout.valid, layout.origin >= 0)


def test_a_batch_of_one_opens_and_shortens_without_reading_the_device(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("host read")

    visual = torch.tensor([[False, True, True, True, False]])
    for name in ("tolist", "item", "nonzero", "__bool__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, read)
    layout = open_layout(visual, None, 3)
    index = torch.tensor([[0, 2]])
    layout, survivors = shorten(layout, *settle(layout, index, torch.zeros(1, 5, 2), None))
    monkeypatch.undo()
    assert survivors.tolist() == [[0, 1, 3, 4]]
    assert layout.visual.tolist() == [[1, 2]]


def test_a_prompt_that_ends_with_its_image_keeps_its_newest_token():
    visual = torch.tensor([[False, True, True, True], [True, True, False, False]])
    layout, hidden = open_layout(visual, None, None), torch.arange(16.0).view(2, 4, 2)
    index = torch.tensor([[0, 1], [0, -1]])
    assert settle(layout, index, hidden, None)[0].tolist() == [[0, 2], [0, -1]]
    alone = open_layout(visual[:1], None, 3)
    for chosen in ([0, 1], [0, 2]):
        fixed, kept = settle(alone, torch.tensor([chosen]), hidden[:1], None)
        assert fixed.tolist() == [[0, 2]] and kept == (2,)
    merged = Reduction(torch.tensor([[1, 0]]), torch.full((1, 2, 2), -1.0))
    fixed, _ = settle(alone, merged, hidden[:1], None)
    assert fixed.index.tolist() == [[0, 2]]  # and it comes last, to see the others
    assert fixed.hidden.tolist() == [
        [[-1.0, -1.0], [6.0, 7.0]]
    ]  # the newest token's own row, not a merged one


def test_rows_that_predict_a_label_stay():
    """They take the places of the last ones chosen, or further places where there are too few."""
    visual = torch.tensor([[True, True, False, True, True, False], [False, True, True, True, True, False]])
    layout, hidden = open_layout(visual, None, None), torch.zeros(2, 6, 2)
    predicting = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]]).bool()  # text rows do no harm
    chosen = torch.tensor([[0, 2, 3], [0, 1, 2]])
    assert settle(layout, chosen, hidden, predicting)[0].tolist() == [[0, 1, 3], [0, 1, 3]]
    few, kept = settle(layout, torch.tensor([[2], [0]]), hidden, predicting)
    assert few.tolist() == [[1, 3], [3, -1]] and kept == (2, 1)
    merged = Reduction(torch.tensor([[3], [1]]), torch.full((2, 1, 2), -1.0))
    few, _ = settle(layout, merged, hidden, predicting)
    assert few.index.tolist() == [[3, 1], [3, -1]]
    assert few.hidden[..., 0].tolist() == [[-1.0, 0.0], [0.0, 0.0]]


def test_small_pieces():
    assert where_true(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool(), 2).tolist() == [[1, 2], [0, -1]]
    assert take(torch.tensor([[7, 8, 9]]), torch.tensor([[2, -1, 0]])).tolist() == [[9, -1, 7]]
    assert take(torch.empty(1, 0, dtype=torch.long), torch.tensor([[-1]])).tolist() == [[-1]]
    back = spread(torch.tensor([[-1, 0, 3]]), torch.ones(1, 3, 2), 5)
    assert back[0, :, 0].tolist() == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("known", [None, 2])
def test_known_count_matters_only_without_padding(known):
    visual = torch.tensor([[False, True, True, False]])
    padding = torch.tensor([[False, True, True, True]])
    layout = open_layout(visual, padding, known)
    assert layout.counts == (2,) and layout.real == (3,)
