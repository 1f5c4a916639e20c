"""Which grids of visual tokens an image or video becomes, and of which crops of the vision tower they are made.

A visual token that is no patch (the newline tokens of LLaVA-NeXT and LLaVA-OneVision) still has a place in a grid: the
end of a line of the tiles' grid, or a grid of its own. So the products of an image's grids add up to its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isqrt, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vlmprune.errors import ModelError
from vlmprune.policies.base import Grid, tokens_in


class View(NamedTuple):
    """One grid of visual tokens.

    Attributes:
        grid: its rows and columns.
        crops: rows and columns of the crops it shows, side by side; (0, 0) = it is newline tokens alone.
        box: top, left, rows and columns of the patches that are left of them; None = all.
        newline: whether its last column is newline tokens.
    """

    grid: Grid
    crops: Grid = (1, 1)
    box: tuple[int, int, int, int] | None = None
    newline: bool = False


ImageViews = tuple[View, ...]
"""The grids of one image or video: their products add up to its visual tokens."""
NEWLINE = View((1, 1), (0, 0), newline=True)


def image_tokens(image: ImageViews) -> int:
    """Visual tokens of one image or video."""
    return tokens_in(view.grid for view in image)


@dataclass
class Encoded:
    """What is remembered of one run of the vision tower.

    Attributes:
        crops: patches of each crop (or video frame) that the tower saw.
        thw: frames, height and width in patches of each image, where the tower was told them.
        mask: ``[T, P]`` False at patches that are padding; None = none are.
        taken: query and key projections, and values where they are asked for, by vision layer and name.
        features: ``[T, P', Dv]`` what the projector got, or ``[S, Dv]`` of packed patches.
        rope: cos and sin of the packed patches, while the tower runs.
        sizes: height and width in pixels of each image, where tiles depend on them; None for one that was not tiled.
        ratio: how many tiles' worth of tokens an image may have, as LLaVA-OneVision is told it.
    """

    crops: tuple[int, ...] = ()
    thw: list[list[int]] | None = None
    mask: Tensor | None = None
    taken: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    rope: Any = None
    sizes: tuple[tuple[int, int] | None, ...] = ()
    ratio: str | None = None


class Shapes(NamedTuple):
    """What an adapter knows of a model: its configuration, and the side of the block of patches that becomes one token."""

    config: Any
    side: int


Adapter = Callable[[Shapes, Sequence[Tensor], Encoded], list[ImageViews]]
"""``(model, features of each image, the tower's run)`` to the grids of each image."""


def square(model: Shapes, features: Sequence[Tensor], encoded: Encoded) -> list[ImageViews]:
    """Every crop is an image of one grid; transformers hands the features over by crop or by sample."""
    height, width = crop_grid(model.config, encoded)
    view = View((height // model.side, width // model.side))
    tokens = sum(len(f) for f in features)
    return [(view,)] * (tokens // tokens_in([view.grid]))


def anyres(model: Shapes, features: Sequence[Tensor], encoded: Encoded) -> list[ImageViews]:
    """The whole image in small, then its unpadded tiles with a newline token after every line."""
    made = [tiled(model.config, size, encoded.ratio) for size in encoded.sizes]
    views = [made[i] for i in _numbers(features, len(made))]
    for f, image in zip(features, views, strict=True):
        if len(f) != image_tokens(image):
            raise ModelError(f"image: expected {image_tokens(image)} visual tokens by its size, got {len(f)}")
    return views


def tiled(config: Any, size: tuple[int, int] | None, ratio: str | None) -> ImageViews:
    """The grids of an image of this height and width in pixels; None = only its small view, and a newline.

    Of a very wide image no line of the tiles is left, of a very tall one the newlines only.
    """
    small, side = View(crop_grid(config)), config.vision_config.image_size
    if size is None:
        return small, NEWLINE
    patches = small.grid[0]
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
    whole = down * patches, across * patches
    height, width = unpad_image(torch.empty(1, *whole, device="meta"), size).shape[1:]
    box = ((whole[0] - height) // 2, (whole[1] - width) // 2, height, width)
    rows, columns = height, width
    if ratio is not None:
        most = int(ratio.removeprefix("anyres_max_"))
        over = sqrt(height * width / (most * patches**2))
        rows, columns = (int(height // over), int(width // over)) if over > 1.1 else (height, width)
    return small, View((rows, columns + 1), (down, across), box, newline=True)


def pooled_frames(model: Shapes, features: Sequence[Tensor], encoded: Encoded) -> list[ImageViews]:
    """LLaVA-OneVision's video: every frame at half the side, one newline token at the end."""
    height, width = crop_grid(model.config)
    frame = View(((height + 1) // 2, (width + 1) // 2), box=(0, 0, height, width))
    return [(frame,) * (len(f) // tokens_in([frame.grid])) + (NEWLINE,) for f in features]


def merged_frames(model: Shapes, features: Sequence[Tensor], encoded: Encoded) -> list[ImageViews]:
    """Qwen-VL's image or video: every (double) frame is a grid of merged patches, in the image's own shape."""
    frames = [(View((h // model.side, w // model.side)),) * t for t, h, w in encoded.thw or []]
    return [frames[i] for i in _numbers(features, len(frames))]


def _numbers(features: Sequence[Tensor], images: int) -> list[int]:
    """Which image of the tower's run each of these features is: beam search repeats those of a sample."""
    if len(features) == images:
        return list(range(images))
    known: dict[int, int] = {}
    for f in features:
        known.setdefault(id(f), len(known))
    return [known[id(f)] for f in features]


def crop_grid(config: Any, encoded: Encoded | None = None) -> Grid:
    """Height and width of one crop in patches: the configuration's, or a square of as many as the tower saw (Idefics3)."""
    if encoded is not None and encoded.crops and encoded.crops[0] != tokens_in([_configured(config)]):
        return isqrt(encoded.crops[0]), isqrt(encoded.crops[0])
    return _configured(config)


def _configured(config: Any) -> Grid:
    vision = config.vision_config
    size, patch = ((n, n) if isinstance(n, int) else tuple(n) for n in (vision.image_size, vision.patch_size))
    return size[0] // patch[0], size[1] // patch[1]
