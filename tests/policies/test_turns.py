"""Choices one after another: ties, padding, quotas, and who falls to whom."""

import torch

from vlmprune.policies.parts.turns import apart, covering, in_order, outlived, taken_in_turn


def told(values, sent):
    """The same values at every turn, and what was taken."""
    while True:
        sent.append((yield values))


def test_in_turn():
    values, sent = torch.tensor([[1.0, 3, 3, 2], [5, 9, 9, 9]]), []
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    assert taken_in_turn(told(values, sent), [3, 1], mask).tolist() == [[1, 2, 3], [0, -1, -1]]
    assert [best.tolist()[0] for best in sent] == [1, 2, 3]
    assert taken_in_turn(told(values, []), [1, 2], None).tolist() == [[1, -1], [1, 2]]
    assert taken_in_turn(told(values, []), [0, 0], None).shape == (2, 0)


def test_covering():
    """The first covers most of all rows; then the one that adds most, and not the next best alone."""
    weights = torch.tensor([[[0.9, 0.8, 0.0], [0.9, 0.9, 0.2], [0.0, 0.0, 0.4]]])
    rule = covering(weights)
    torch.testing.assert_close(next(rule), torch.tensor([[1.8, 1.7, 0.6]]))
    torch.testing.assert_close(rule.send(torch.tensor([0])), torch.tensor([[0.0, 0.0, 0.4]]))


def test_apart():
    """Weight alone, then times the distance to the nearest one taken."""
    unit = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    rule = apart(unit, torch.tensor([[1.0, 2.0, 3.0]]))
    assert next(rule).tolist() == [[1.0, 2.0, 3.0]]
    torch.testing.assert_close(rule.send(torch.tensor([2])), torch.tensor([[1.0, 2 * 0.2, 0.0]]))
    torch.testing.assert_close(rule.send(torch.tensor([0])), torch.tensor([[0.0, 2 * 0.2, 0.0]]))


def test_outlived():
    g = torch.Generator().manual_seed(0)
    close = torch.rand(4, 12, 12, generator=g) < 0.2
    got = outlived(close)
    for b in range(4):
        stand = []
        for j in range(12):
            if not any(close[b, i, j] for i in stand):
                stand.append(j)
        assert [j for j in range(12) if not got[b, j]] == stand
    assert outlived(close[:, :1, :1]).tolist() == [[False]] * 4


def test_in_order():
    matrix, order = torch.arange(9).view(1, 3, 3), torch.tensor([[2, 0, 1]])
    assert in_order(matrix, order).tolist() == [[[8, 6, 7], [2, 0, 1], [5, 3, 4]]]
