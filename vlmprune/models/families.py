"""The model families that can be pruned: one row each, and the short adapters that say which grids an image becomes.

A visual token that is no patch (the newline tokens of LLaVA-NeXT and LLaVA-OneVision) still has a place in a grid: the
last column of the tiles' grid, or a grid of its own. So the products of an image's grids add up to its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from vlmprune.policies.base import Grid, tokens_in

ImageGrids = tuple[Grid, ...]
"""The grids of one image or video: their products add up to its visual tokens."""

CLIP_LIKE = ("clip_vision_model", "siglip_vision_model")
HAS_CLS = ("clip_vision_model", "internvl_vision")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
REFUSED = {
    "gemma3": "image tokens attend in both directions and most layers slide",
    "gemma3n": "image tokens attend in both directions and most layers slide",
    "paligemma": "the whole prompt attends in both directions",
    "mllama": "images enter through cross-attention and are no tokens of the decoder",
}
"""Families that cannot be pruned, and why."""


@dataclass
class Encoded:
    """What is remembered of one run of the vision tower. It rides on the tower's output object, and so with its features.

    Attributes:
        crops: patches of each crop (or video frame) that the tower saw.
        thw: frames, patch rows and patch columns of each image, where the tower was told them.
        mask: ``[T, P]`` False at patches that are padding; None = none are.
        taken: query and key projections, by vision layer and name.
        features: ``[T, P', Dv]`` what the projector got.
    """

    crops: tuple[int, ...]
    thw: list[list[int]] | None = None
    mask: Tensor | None = None
    taken: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    features: Tensor | None = None


Adapter = Callable[[Any, Sequence[Tensor], Encoded], list[ImageGrids]]
"""``(base model, features of each image, the tower's run)`` to the grids of each image."""


def square(base: Any, features: Sequence[Tensor], encoded: Encoded) -> list[ImageGrids]:
    """Every crop is an image of one grid; transformers hands the features over by crop or by sample."""
    grid = token_grid(base.config, encoded)
    tokens = sum(len(f) for f in features)
    return [(grid,)] * (tokens // tokens_in([grid]))


def anyres(base: Any, features: Sequence[Tensor], encoded: Encoded) -> list[ImageGrids]:
    """The whole image in small, then its unpadded tiles with a newline token after every row.

    How wide the tiles are is read off the first newline: the sizes of the images do not reach the model's forward.
    One host read for all images.
    """
    grid = patches_of(base.config)
    small = grid[0] * grid[1]
    newline = base.image_newline
    firsts = [(f[small:] == newline.to(f)).all(-1).to(torch.uint8).argmax() for f in features]
    widths = [first + 1 for first in torch.stack(firsts).tolist()]
    return [(grid, ((len(f) - small) // w, w)) for f, w in zip(features, widths, strict=True)]


def pooled_frames(base: Any, features: Sequence[Tensor], encoded: Encoded) -> list[ImageGrids]:
    """LLaVA-OneVision's video: every frame at half the side, one newline token at the end."""
    rows, columns = patches_of(base.config)
    frame = ((rows + 1) // 2, (columns + 1) // 2)
    return [(frame,) * (len(f) // tokens_in([frame])) + ((1, 1),) for f in features]


def merged_frames(base: Any, features: Sequence[Tensor], encoded: Encoded) -> list[ImageGrids]:
    """Qwen-VL's image or video: every (double) frame is a grid of merged patches, in the image's own shape.

    Beam search repeats the features of a sample; the tower was told of each image once.
    """
    side = base.config.vision_config.spatial_merge_size
    grids = [((h // side, w // side),) * t for t, h, w in encoded.thw or []]
    number: dict[int, int] = {}
    for f in features:
        number.setdefault(id(f), len(number))
    return [grids[number[id(f)]] for f in features]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        text, vision, projector: where the parts are below the base model.
        towers, decoders: model types of vision tower and decoder that are known to work.
        images, videos: which grids the features of the images and videos are.
        side: patches along each side of the block that the projector turns into one row.
        tapped: whether each visual token is such a block, so that the tower's attention says something about it.
        packs: whether positions can be packed (not with the three-dimensional positions of Qwen-VL).
        first: first decoder layer that can be a stage.
    """

    text: str = "language_model"
    vision: str = "vision_tower"
    projector: str = "multi_modal_projector"
    towers: tuple[str, ...] = CLIP_LIKE
    decoders: tuple[str, ...] = DECODERS
    images: Adapter = square
    videos: Adapter | None = None
    side: Callable[[Any], int] = lambda config: 1
    tapped: bool = True
    packs: bool = True
    first: Callable[[Any], int] = lambda config: 0

    @property
    def square(self) -> bool:
        """Whether the configuration alone says which grid an image becomes."""
        return self.images is square


def idefics(name: str) -> Family:
    """Idefics3 and its small relative: other names, and a connector that folds blocks of patches."""
    return Family(
        text="text_model",
        vision="vision_model",
        projector="connector.modality_projection",
        towers=(f"{name}_vision",),
        side=lambda config: config.scale_factor,
    )


def qwen(name: str, first: Callable[[Any], int] = lambda config: 0) -> Family:
    """The Qwen-VL line: fused vision projections over packed frames, three-dimensional positions."""
    return Family(
        vision="visual",
        projector="visual.merger",
        towers=(f"{name}_vision",),
        decoders=(f"{name}_text",),
        images=merged_frames,
        videos=merged_frames,
        side=lambda config: config.vision_config.spatial_merge_size,
        tapped=False,
        packs=False,
        first=first,
    )


FAMILIES = {
    "llava": Family(),
    "llava_next": Family(images=anyres, tapped=False),
    "llava_onevision": Family(images=anyres, videos=pooled_frames, tapped=False),
    "internvl": Family(towers=("internvl_vision",), side=lambda config: round(1 / config.downsample_ratio)),
    "idefics3": idefics("idefics3"),
    "smolvlm": idefics("smolvlm"),
    "qwen2_vl": qwen("qwen2_vl"),
    "qwen2_5_vl": qwen("qwen2_5_vl"),
    # The decoder adds the tower's intermediate features to the full sequence after each of its first layers.
    "qwen3_vl": qwen("qwen3_vl", first=lambda config: len(config.vision_config.deepstack_visual_indexes)),
}
"""By ``config.model_type``."""


def token_grid(config: Any, encoded: Encoded | None = None) -> Grid:
    """Rows and columns of visual tokens that one crop becomes."""
    side = FAMILIES[config.model_type].side(config)
    rows, columns = patches_of(config, encoded)
    return rows // side, columns // side


def patches_of(config: Any, encoded: Encoded | None = None) -> Grid:
    """Patch rows and columns of one crop: the configuration's, or a square of as many as the tower saw (Idefics3)."""
    if encoded is not None and encoded.crops and encoded.crops[0] != tokens_in([patches_of(config)]):
        return isqrt(encoded.crops[0]), isqrt(encoded.crops[0])
    vision = config.vision_config
    size, patch = ((n, n) if isinstance(n, int) else tuple(n) for n in (vision.image_size, vision.patch_size))
    return size[0] // patch[0], size[1] // patch[1]
