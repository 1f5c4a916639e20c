"""The order of a Python set, found with tensors, against sets of Python."""

import random

import pytest
import torch

from vlmprune.policies.parts.set_order import set_order


def walked(rows):
    """The rows in the order that ``set_order`` says, without what is none."""
    numbers = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1)
    order = set_order(numbers)
    assert torch.equal(order.sort(1).values, torch.arange(numbers.shape[1]).expand_as(numbers))
    return [[n for n in row if n >= 0] for row in numbers.gather(1, order).tolist()]


@pytest.mark.parametrize("most", [12, 700, 2**34])
@pytest.mark.parametrize("size", [0, 1, 4, 5, 8, 18, 19, 76, 77])
def test_equals_sets(most, size):
    """The tables grow at the 5th, 19th and 77th number."""
    draw = random.Random(f"{most} {size}")
    # sampled one by one, as a set is what is tested
    rows = [list(dict.fromkeys(draw.randrange(most) for _ in range(3 * size)))[:size] for _ in range(100)]
    rows = [row for row in rows if len(row) == size]
    assert rows or size > most / 3
    if rows:
        assert walked(rows) == [list(set(row)) for row in rows]


def test_numbers_that_collide():
    """Multiples of the table's size all begin at one slot."""
    draw = random.Random(0)
    for step in (8, 32, 128, 2**10, 2**29):
        rows = [[step * draw.randrange(1, 30) + draw.randrange(2) for _ in range(8)] for _ in range(500)]
        rows = [row for row in rows if len({*row}) == 8]
        assert len(rows) > 50
        assert walked(rows) == [list(set(row)) for row in rows]


def test_a_row_with_fewer_numbers_has_the_order_of_a_smaller_set():
    """Wherever in the row what is none stands."""
    draw, rows, sets = random.Random(0), [], []
    for _ in range(3000):
        numbers = draw.sample(range(700), draw.randrange(9))
        row = [-1] * 8
        for place, number in zip(sorted(draw.sample(range(8), len(numbers))), numbers, strict=True):
            row[place] = number
        rows.append(row)
        sets.append(list(set(numbers)))
    assert walked(rows) == sets
