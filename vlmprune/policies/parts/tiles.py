"""Images seen as a small view and tiles: what of the small view each tile shows, and budgets shared out over the tiles by it."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vlmprune.constants import remembered, whole_numbers
from vlmprune.errors import check
from vlmprune.policies.base import Crop, Grid, Positions, PruningPolicy, Ranking, TokenContext
from vlmprune.policies.by_image import quota_of, ranked
from vlmprune.policies.groups import Counts, Groups
from vlmprune.policies.parts.apportion import apportioned

HAIR = 1e-6
"""What a share may miss a whole number by and still count as it, so that equal parts are equal, as in ``keep_count``."""


class Tiled(NamedTuple):
    """An image of which the tower saw all in small, and then parts.

    Attributes:
        first: number of the small view among the crops of the batch; its tiles follow.
        small: rows and columns of its tokens.
        grid: rows and columns of all tiles side by side, without newline tokens.
        parts: of each tile, its top row and left column in that grid, its rows and its columns.
    """

    first: int
    small: Grid
    grid: Grid
    parts: tuple[tuple[int, int, int, int], ...]

    @property
    def tokens(self) -> int:
        """Those of the small view."""
        return self.small[0] * self.small[1]

    @property
    def sizes(self) -> Counts:
        """How many tokens each tile has."""
        return tuple(rows * columns for *_, rows, columns in self.parts)


Share = Callable[[int, Tiled], tuple[int, Tensor, Tensor]]
"""``(tokens that stay of an image, the image)`` to how many its small view gets, how many each tile (int64), and their weights:
what is left over goes to the heaviest tile first, and to the small view last."""


def tiled_images(ctx: TokenContext, crops: Groups) -> tuple[Tiled | None, ...]:
    """Of every image its small view and tiles; None for one that is a crop, or each grid of which is one, as a video's frames.

    A tile is told by lying in a grid with more than itself: other tiles, or newlines. Raises InputError where tiles are not
    those of one grid behind the small view.

    Example:
        >>> from vlmprune.policies import crops_of
        >>> tiled_images(ctx, crops_of(ctx))  # no image is cut up
        (None, None, None)
    """
    return _tiled_images(ctx.grids, crops.crops, crops.members, crops.owners)


def shared_over_tiles(
    ctx: TokenContext,
    policy: PruningPolicy,
    crops: Groups,
    scores: Tensor,
    share: Share,
    positions: Positions = "keep",
) -> Ranking:
    """The best of every crop, as many as ``share`` grants; in an image without tiles as many of each.

    Args:
        ctx: the stage's context.
        policy: whose ``kept`` counts for each image (its ``spend`` is "image").
        crops: those of the context.
        scores: ``[I, T]``, the higher survives.
        share: how an image's tokens are shared out over small view and tiles.
        positions: of the tokens that stay.
    """
    quota, device = quota_of(ctx, policy, crops), scores.device
    grants, weights = [], []
    for members, tiled in zip(crops.members, tiled_images(ctx, crops), strict=True):
        even = tuple(quota.kept[group] for group in members)
        own = whole_numbers(even, device)
        heavy = torch.zeros_like(own, dtype=torch.float64)
        if tiled is not None:
            first, own, heavy = share(sum(even), tiled)
            own = torch.cat([own.new_full((1,), first), own])
            heavy = torch.cat([heavy.new_full((1,), float("-inf")), heavy])
        grants.append(own)
        weights.append(heavy.double())
    given = torch.cat(grants), torch.cat(weights)

    def chosen(scores: Tensor) -> Ranking:
        def behind(last: Tensor) -> Ranking:
            return chosen(scores.masked_fill(crops.split(last), float("-inf")))

        return replace(ranked(ctx, policy, apportioned(crops, scores, *given), positions), again=behind)

    return chosen(scores)


def by_weight(weights: Tensor, total: int) -> Tensor:
    """``total`` in parts proportional to ``weights [n]`` (none below 0; what is not finite counts as 0), rounded down: int64."""
    finite = weights.double().nan_to_num(0.0, 0.0, 0.0)
    parts = total * finite / finite.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (parts + HAIR).floor().long()


def over_areas(small: Tensor, tiled: Tiled) -> Tensor:
    """Sums ``[tiles]`` float64 of the small view's ``small [n]`` over what each tile shows of the image.

    A token belongs to the tile that shows its middle.
    """
    tile = areas(tiled, small.device)
    here = tile == torch.arange(len(tiled.parts), device=small.device)[:, None]
    return torch.where(here, small.double(), 0.0).sum(1)


def stretched(small: Tensor, tiled: Tiled, tokens: int) -> tuple[Tensor, Tensor]:
    """The small view's ``small [n]``, stretched over the grid of all tiles (bilinear), at every tile's tokens.

    Returns:
        ``[tiles, tokens]`` each: the numbers, 0 behind a smaller tile's tokens, and bool, False there.
    """
    at = seats(tiled, tokens, small.device)
    view = small.view(1, 1, *tiled.small)
    wide = interpolate(view, size=tiled.grid, mode="bilinear", align_corners=False).flatten()
    real = at >= 0
    return wide[at.clamp(min=0)].masked_fill(~real, 0.0), real


@remembered()
def areas(tiled: Tiled, device: torch.device) -> Tensor:
    """``[n]`` int64 which tile shows the middle of each token of the small view.

    Example:
        >>> two = Tiled(0, (2, 3), (2, 6), ((0, 0, 2, 3), (0, 3, 2, 3)))
        >>> areas(two, torch.device("cpu"))
        tensor([0, 1, 1, 0, 1, 1])
    """
    (height, width), (rows, columns) = tiled.small, tiled.grid
    owner = torch.full(tiled.grid, -1)
    for number, (top, left, h, w) in enumerate(tiled.parts):
        owner[top : top + h, left : left + w] = number
    down = (2 * torch.arange(height) + 1) * rows // (2 * height)
    across = (2 * torch.arange(width) + 1) * columns // (2 * width)
    return owner[down[:, None], across].flatten().to(device)


@remembered()
def seats(tiled: Tiled, tokens: int, device: torch.device) -> Tensor:
    """``[tiles, tokens]`` int64 the place of every token of every tile in the grid of all tiles; -1 behind a smaller one's."""
    columns = tiled.grid[1]
    lines = [
        [(top + r) * columns + left + c for r in range(h) for c in range(w)]
        for top, left, h, w in tiled.parts
    ]
    return torch.tensor([line + [-1] * (tokens - len(line)) for line in lines]).to(device)


@lru_cache(64)
def _tiled_images(
    grids: tuple[tuple[Grid, ...], ...], crops: tuple[Crop, ...], members: tuple[Counts, ...], owners: Counts
) -> tuple[Tiled | None, ...]:
    firsts = [[*accumulate((r * c for r, c in own), initial=0)] for own in grids]
    found = []
    for own, owner in zip(members, owners, strict=True):
        mine = [crops[group] for group in own]
        homes = [bisect(firsts[owner], crop.first) - 1 for crop in mine]
        found.append(_tiled(own[0], mine, homes, grids[owner], firsts[owner]) if len(own) > 1 else None)
    return tuple(found)


def _tiled(
    first: int, crops: list[Crop], homes: list[int], grids: tuple[Grid, ...], firsts: list[int]
) -> Tiled | None:
    """One image of several crops, each in the grid of its number in ``homes``."""
    whole = [(crop.rows, crop.columns) == grids[home] for crop, home in zip(crops, homes, strict=True)]
    if all(whole):
        return None
    behind = whole[0] and len({*homes[1:]}) == 1 and homes[1] != homes[0]
    check(behind, "ctx.crops", "an image's small view before the tiles of one grid", crops)
    small, columns = crops[0], grids[homes[1]][1]
    corners = [divmod(crop.first - firsts[homes[1]], columns) for crop in crops[1:]]
    parts = [(*corner, crop.rows, crop.columns) for corner, crop in zip(corners, crops[1:], strict=True)]
    ends = [(top + rows, left + wide) for top, left, rows, wide in parts]
    grid = max(end for end, _ in ends), max(end for _, end in ends)
    return Tiled(first, (small.rows, small.columns), grid, tuple(parts))
