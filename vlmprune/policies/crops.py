"""Where the images and crops of a batch lie among its visual tokens, read off a context."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from vlmprune.errors import check
from vlmprune.policies.base import Crop, TokenContext
from vlmprune.policies.groups import Counts, Groups, places_of


def images_of(ctx: TokenContext) -> Groups:
    """Where the images lie. Raises ValueError if an earlier stage or chunked prefill left a part of their tokens.

    Example:
        >>> images_of(ctx).crops[2], images_of(ctx).tokens
        (Crop(first=4, width=4, rows=1, columns=4), (4, 4, 4))
    """
    sizes = _whole(ctx)
    firsts = [[*accumulate(own, initial=0)][:-1] for own in sizes]
    lines = [
        tuple((Crop(first, n, 1, n),) for first, n in zip(*each, strict=True))
        for each in zip(firsts, sizes, strict=True)
    ]
    return _grouped(ctx, lines, sizes)


def crops_of(ctx: TokenContext, unpruned: bool = False) -> Groups:
    """Where the crops of the images lie, as the vision tower saw them. Raises ValueError as ``images_of``.

    ``unpruned`` asks where they lay among the tokens that ``ctx.ordinals`` number, whatever earlier stages have left of them.

    Example:
        >>> crops_of(ctx).crops[0], crops_of(ctx).tokens
        (Crop(first=0, width=2, rows=2, columns=2), (4, 4, 4))
    """
    sizes = _whole(ctx, unpruned)
    if ctx.crops is not None:
        return _grouped(ctx, ctx.crops, sizes, unpruned)
    found = []
    for grids, own in zip(ctx.grids, sizes, strict=True):
        left, first, images = list(grids), 0, []
        for end in accumulate(own):
            some = []
            while left and first < end:
                rows, columns = left.pop(0)
                some.append(Crop(first, columns, rows, columns))
                first += rows * columns
            images.append(tuple(some))
        found.append(tuple(images))
    return _grouped(ctx, found, sizes, unpruned)


def _whole(ctx: TokenContext, unpruned: bool = False) -> tuple[Counts, ...]:
    cut = ctx.shares is not None
    check(not cut, "prefill_chunk_size", "None with a method that needs whole images", "a prompt in chunks")
    sizes = ctx.images()
    whole = tuple(map(sum, sizes))
    there = unpruned or ctx.counts == whole
    check(there, "ctx.counts", f"{whole}, every token of every image", ctx.counts)
    return sizes


def _grouped(
    ctx: TokenContext,
    samples: Sequence[Sequence[Sequence[Crop]]],
    sizes: Sequence[Sequence[int]],
    unpruned: bool = False,
) -> Groups:
    crops: list[Crop] = []
    of_sample: list[int] = []
    of_image: list[int] = []
    rest: list[Counts] = []
    owners: list[int] = []
    for b, (images, own) in enumerate(zip(samples, sizes, strict=True)):
        firsts = accumulate(own, initial=0)
        for some, n, first in zip(images, own, firsts, strict=False):
            crops += some
            of_sample += [b] * len(some)
            of_image += [len(owners)] * len(some)
            inside = set() if sum(c.rows * c.columns for c in some) == n else set(range(first, first + n))
            for crop in some if inside else ():
                inside -= set(places_of(crop))
            rest.append(tuple(sorted(inside)))
            owners.append(b)
    shape = (len(sizes), max(map(sum, sizes), default=0)) if unpruned else ctx.mask.shape
    return Groups(tuple(crops), tuple(of_sample), tuple(of_image), tuple(rest), tuple(owners), *shape)
