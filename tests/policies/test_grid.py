"""The coarse grid: found from the tokens' ordinals, on any mixture of images, without asking the device."""

from dataclasses import replace

import pytest
import torch

from helpers.contexts import case
from vlmprune.policies.parts.lattice import stride_grid

BATCHES = [
    pytest.param([((27, 27),)], None, id="square"),
    pytest.param([((3, 8),), ((8, 3),)], None, id="not-square"),
    pytest.param([((4, 5), (5, 3)), (), ((1, 7),)], None, id="two-none-one"),
    pytest.param(
        [((4, 5), (5, 3)), ((6, 6),)], [[0, 1, 10, 19, 20, 22, 23, 34], [7, 13]], id="after-a-stage"
    ),
    pytest.param([(), ()], None, id="no-images"),
]


@pytest.mark.parametrize("images, kept", BATCHES)
@pytest.mark.parametrize("stride", [1, 2, 3, 100])
def test_equals_slicing(images, kept, stride):
    ctx = case(images, kept=kept).ctx
    got = stride_grid(ctx, stride)
    for sample, grids in enumerate(images):
        parts = [torch.zeros(rows, cols, dtype=torch.bool) for rows, cols in grids]
        for part in parts:
            part[::stride, ::stride] = True
        lookup = torch.cat([torch.zeros(0, dtype=torch.bool), *(p.flatten() for p in parts)])
        numbers = ctx.ordinals[sample][: ctx.counts[sample]]
        assert torch.equal(got[sample][: len(numbers)], lookup[numbers])
        assert not got[sample][len(numbers) :].any()


def test_paper_counts():
    def count(side, stride):
        return int(stride_grid(case([((side, side),)]).ctx, stride).sum())

    assert [count(27, 3), count(27, 2), count(24, 3), count(24, 2)] == [81, 196, 64, 144]


def test_never_waits_for_the_device():
    """Meta tensors hold no values: reading one on the host would raise."""
    ctx = case(["two", "none"]).ctx
    meta = replace(ctx, mask=ctx.mask.to("meta"), ordinals=ctx.ordinals.to("meta"))
    assert stride_grid(meta, 3).shape == ctx.mask.shape
