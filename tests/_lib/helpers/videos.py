"""Contexts whose images are videos: several grids of one image, as frames, and perhaps newline tokens behind them."""

from dataclasses import replace

import torch

from vlmprune.policies.vision import Crop, VisionAttention
from vlmprune.testing.context import make_case

NEWLINE = "newline"
"""Among an image's grids: a token that is of no frame."""


def videos(samples, layers=(), *, few_values=False, cls=False, seed=0, width=8):
    """A context at layer 0 of samples of images of grids; with ``layers`` also the tower's, of frames of any size.

    A grid is ``(rows, columns)`` or NEWLINE. Few values: hidden states are of three rows only.
    """
    g = torch.Generator().manual_seed(seed)
    plain = [
        [[(1, 1) if grid == NEWLINE else grid for grid in image] for image in images] for images in samples
    ]
    made = make_case([[grid for image in images for grid in image] for images in plain], 0)
    crops = tuple(tuple(frames_in(images)) for images in samples)
    hidden = torch.randn(*made.ctx.mask.shape, width, generator=g)
    if few_values:
        hidden = torch.randint(1, 3, (3, width), generator=g).float()[
            torch.randint(3, hidden.shape[:2], generator=g)
        ]
    ctx = replace(
        made.ctx,
        hidden=hidden.masked_fill(~made.ctx.mask[..., None], 0.0),
        sizes=tuple(tuple(sum(r * c for r, c in image) for image in images) for images in plain),
        crops=crops,
    )
    every = [crop for images in crops for image in images for crop in image]
    return with_tower(ctx, every, layers, cls, g) if layers and every else ctx


def frames_in(images):
    """Of every image of a sample, its crops."""
    first = 0
    for image in images:
        own = []
        for grid in image:
            rows, columns = (1, 1) if grid == NEWLINE else grid
            if grid != NEWLINE:
                own.append(Crop(first, columns, rows, columns))
            first += rows * columns
        yield tuple(own)


def with_tower(ctx, crops, layers, cls, g):
    """The same with query, key and features of every frame; a smaller one's rows are padded."""
    sizes = [crop.rows * crop.columns for crop in crops]
    most, ragged = max(sizes), len(set(sizes)) > 1
    real = torch.arange(most) < torch.tensor(sizes)[:, None]
    cells = torch.where(real, torch.arange(len(sizes) * most).view(-1, most), -1)[..., None]
    seen = {}
    for layer in layers:
        query, key = (torch.randn(len(sizes), 2, most + cls, 8, generator=g) for _ in range(2))
        mask, where = (real, cells) if ragged else (None, None)
        seen[layer] = VisionAttention(query, key, 8**-0.5, cls, mask, where)
    features = torch.randn(len(sizes), most, 12, generator=g).masked_fill(~real[..., None], 0.0)
    return replace(ctx, vision=seen, features=features, project=lambda x: x[..., :8])


def frames_of_images(ctx):
    """Of every sample, its images as lists of frames, each the places of its tokens; then each image's other places."""
    for images, sizes in zip(ctx.crops, ctx.images(), strict=True):
        here, first = [], 0
        for crops, n in zip(images, sizes, strict=True):
            own = [[c.first + i for i in range(c.rows * c.columns)] for c in crops]
            taken = {place for frame in own for place in frame}
            here.append((own, [p for p in range(first, first + n) if p not in taken], crops))
            first += n
        yield here
