"""Neighbours on the grids of crops of several sizes."""

import torch

from helpers.contexts import case
from vlmprune.policies.crops import crops_of
from vlmprune.policies.parts.windows import with_neighbours


def test_no_neighbour_is_across_an_edge():
    crops = crops_of(case([((3, 4), (2, 5))], layer=0).ctx)
    for group, (rows, columns) in enumerate([(3, 4), (2, 5)]):
        for place in range(rows * columns):
            marked = torch.zeros(2, 12, dtype=torch.bool)
            marked[group, place] = True
            r, c = divmod(place, columns)
            near = [(r, c), (r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
            expected = {y * columns + x for y, x in near if 0 <= y < rows and 0 <= x < columns}
            found = with_neighbours(crops, marked)
            real = found[group, : rows * columns]
            assert {*real.nonzero().flatten().tolist()} == expected
            assert not found[1 - group].any()


def test_several_are_joined():
    crops = crops_of(case([((3, 3),)], layer=0).ctx)
    marked = torch.tensor([[True, False, False, False, False, False, False, False, True]])
    wanted = [[True, True, False, True, False, True, False, True, True]]
    assert with_neighbours(crops, marked).tolist() == wanted
    assert not with_neighbours(crops, torch.zeros_like(marked)).any()
