"""The oracle: what a method could keep that knew where the answer is seen. It must be told, so it is no policy to run with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.eval.questions import Question, Region
from vlmprune.models import patch_grid
from vlmprune.policies.base import Grid, PruningPolicy, TokenContext
from vlmprune.policies.choose import quotas
from vlmprune.policies.methods.uniform import Uniform
from vlmprune.policies.parts.lattice import grid_scores

ROUNDING = 1e-6
"""How far a region may reach into a patch, in patches, without touching it."""
PIXEL = 0.999
"""The least width and height of a box in pixels, less what rounding takes."""


@dataclass(frozen=True)
class Oracle(PruningPolicy):
    """Keeps the patches that the answer's box touches, and evenly spaced ones of all others.

    As many as ``Uniform`` keeps, spaced by the same rule, and with no box the same ones: the difference between the two
    is what knowing the place is worth. Where the box touches more patches than may stay, evenly spaced ones of those.

    A bound for methods that choose where to look, at this layer; no proof that none can do better: the rest of the image
    may matter too, and by a later layer what a patch shows may have moved to other tokens.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        regions: where the answer of each sample of the batch is seen, None = not known; empty = of none is.
        order: how the evenly spaced ones are, as for ``Uniform``.

    Raises:
        InputError: a setting is out of range, or the regions are not one per sample of one image each.
    """

    summary: ClassVar[str] = "patches of the true box, then evenly spaced ones"

    layer: int = 2
    keep: int | float = 0.25
    regions: tuple[Region | None, ...] = field(default=(), repr=False)
    order: Literal["lattice", "raster"] = "lattice"

    def __post_init__(self) -> None:
        Uniform(self.layer, self.keep, order=self.order)  # checks all three

    @property
    def layers(self) -> tuple[int, ...]:
        """The one stage."""
        return (self.layer,)

    def select(self, ctx: TokenContext) -> Tensor:
        """The patches of each sample: chosen on the host where its region is known, else what ``Uniform`` keeps."""
        samples = len(ctx.counts)
        regions = self.regions or (None,) * samples
        check(len(regions) == samples, "regions", f"{samples}, one per sample", len(regions))
        index = Uniform(self.layer, self.keep, order=self.order).rank(ctx).index(ctx)
        kept = quotas(ctx, self)
        for sample, region in enumerate(regions):
            if region is not None:
                grids, tokens = ctx.grids[sample], ctx.counts[sample]
                one = len(grids) == 1 and math.prod(grids[0]) == tokens
                got = f"{tokens} tokens of {grids}"
                check(one, "regions", "samples of one image with one grid, all of it", got)
                row = torch.tensor(self._choose(region, grids[0], kept[sample]), dtype=torch.int64)
                index[sample, : len(row)] = row.to(index.device, non_blocking=True)
        return index

    def _choose(self, region: Region, grid: Grid, count: int) -> list[int]:
        """``count`` of the patches of one image, ascending."""
        inside = patches_in(region, grid)
        others = sorted(set(range(math.prod(grid))).difference(inside))
        first = self._spread(inside, min(count, len(inside)), grid)
        return sorted(first + self._spread(others, count - len(first), grid))

    def _spread(self, items: list[int], count: int, grid: Grid) -> list[int]:
        """``count`` of the items, evenly spaced."""
        if self.order == "raster":
            return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
        scores = grid_scores(grid, count * math.prod(grid) // max(len(items), 1))[items]
        return [items[i] for i in scores.argsort(descending=True, stable=True)[:count].tolist()]


def check_oracle(questions: Sequence[Question], config: Any, processor: Any) -> None:
    """Refuse what an oracle cannot be told: questions without boxes, and images whose patches cannot be matched to them.

    Raises:
        InputError: no question has a box, one lies outside its image, or the processor cuts off or pads an image that has one.
        ModelError: the model's images do not share one grid.
    """
    boxes = [question for question in questions if question.box is not None]
    check(bool(boxes), "oracle", "questions with a box", "none")
    patch_grid(config)
    for question in boxes:
        width, height = question.size
        x1, y1, x2, y2 = question.region or (0, 0, 0, 0)
        seen = (x2 - x1) * width > PIXEL and (y2 - y1) * height > PIXEL  # shares of the image would not be
        inside = f"a box x1 y1 x2 y2 of a pixel or more within {width} x {height} pixels"
        check(seen, f"question {question.id!r}", inside, question.box)
        expected = "images that the processor shows whole (it crops or pads this one; square ones may do)"
        whole = _shows_whole(processor.image_processor, question.size)
        check(whole, "oracle", expected, f"{width} x {height} in question {question.id!r}")


def patches_in(region: Region, grid: Grid) -> list[int]:
    """The patches of ``grid``, in raster order, that a region of the image touches with more than its edge.

    >>> patches_in((0, 0, 0.5, 0.3), (4, 4))
    [0, 1, 4, 5]
    """
    rows, columns = grid
    left, top, right, bottom = region
    down = range(math.floor(top * rows + ROUNDING), math.ceil(bottom * rows - ROUNDING))
    across = range(math.floor(left * columns + ROUNDING), math.ceil(right * columns - ROUNDING))
    return [row * columns + column for row in down for column in across]


def _shows_whole(image_processor: Any, size: tuple[int, int]) -> bool:
    """Whether the model sees all of an image of this size, so that shares of the image are shares of the grid."""
    if image_processor.do_pad and size[0] != size[1]:
        return False  # shares of a padded square are not shares of the image
    if not image_processor.do_center_crop:
        return True
    crop, resized = image_processor.crop_size, image_processor.size
    if "shortest_edge" in resized:
        return size[0] == size[1] and crop["height"] == crop["width"] == resized["shortest_edge"]
    return (crop["height"], crop["width"]) == (resized["height"], resized["width"])
