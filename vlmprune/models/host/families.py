"""The model families that can be pruned: one entry each, and the short adapters that say which grids an image becomes.

A visual token that is no patch (the newline tokens of LLaVA-NeXT and LLaVA-OneVision) still has a place in a grid: the
end of a line of the tiles' grid, or a grid of its own. So the products of an image's grids add up to its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from vlmprune.policies.base import Grid, tokens_in

ImageGrids = tuple[Grid, ...]
"""The grids of one image or video: their products add up to its visual tokens."""

CLIP_LIKE = ("clip_vision_model", "siglip_vision_model")
LANGUAGE = ("llama", "mistral", "qwen2", "qwen3")
REFUSED = {
    "gemma3": "image tokens attend in both directions and most layers slide",
    "gemma3n": "image tokens attend in both directions and most layers slide",
    "paligemma": "the whole prompt attends in both directions",
    "mllama": "images enter through cross-attention and are no tokens of the decoder",
}
"""Families that cannot be pruned, and why."""


@dataclass(frozen=True)
class Tower:
    """What one type of vision tower calls things, and does.

    Attributes:
        layers: where its blocks are.
        attention: a block's attention module.
        cls: whether its first state is that of a CLS token.
        normed: whether its attention has norms behind the projections of query and key.
        grids: argument that tells it frames, height and width in patches of each image.
        padding: argument that tells it which patches are no padding.
        width, depth: settings for the width of its states and for how many blocks it has.
        windows: setting that lists the blocks which see all of an image, where the others see a window.
        mergers: further projectors inside it.
    """

    layers: str = "encoder.layers"
    attention: str = "self_attn"
    cls: bool = False
    normed: bool = False
    grids: str | None = None
    padding: str | None = None
    width: str = "hidden_size"
    depth: str = "num_hidden_layers"
    windows: str | None = None
    mergers: str | None = None


QWEN = Tower("blocks", "attn", grids="grid_thw", depth="depth")
TOWERS = {
    "clip_vision_model": Tower(cls=True),
    "siglip_vision_model": Tower(),
    "internvl_vision": Tower("encoder.layer", "attention", cls=True, normed=True),
    "idefics3_vision": Tower(padding="patch_attention_mask"),
    "smolvlm_vision": Tower(padding="patch_attention_mask"),
    "qwen2_vl_vision": replace(QWEN, width="embed_dim"),
    "qwen2_5_vl_vision": replace(QWEN, windows="fullatt_block_indexes"),
    "qwen3_vl_vision": replace(QWEN, mergers="deepstack_merger_list"),
}
"""By ``config.vision_config.model_type``."""


@dataclass(frozen=True)
class Decoder:
    """What one type of decoder does.

    Attributes:
        window: setting that tells of layers which do not see everything: a size, or the kind of each layer.
        normed: whether its attention has norms behind the projections of query and key.
        head_dim: whether it has a setting for the width of a head, rather than an equal share of the hidden size.
    """

    window: str | None = None
    normed: bool = False
    head_dim: bool = False


DECODERS = {
    "llama": Decoder(head_dim=True),
    "mistral": Decoder("sliding_window", head_dim=True),
    "qwen2": Decoder("layer_types"),
    "qwen3": Decoder("layer_types", normed=True, head_dim=True),
    "qwen2_vl_text": Decoder("layer_types"),
    "qwen2_5_vl_text": Decoder("layer_types"),
    "qwen3_vl_text": Decoder(normed=True, head_dim=True),
}
"""By ``config.text_config.model_type``."""


@dataclass
class Encoded:
    """What is remembered of one run of the vision tower.

    Attributes:
        crops: patches of each crop (or video frame) that the tower saw.
        thw: frames, height and width in patches of each image, where the tower was told them.
        mask: ``[T, P]`` False at patches that are padding; None = none are.
        taken: query and key projections, by vision layer and name.
        features: ``[T, P', Dv]`` what the projector got.
    """

    crops: tuple[int, ...] = ()
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
    """The whole image in small, then its unpadded tiles with a newline token after every line.

    How wide the tiles are is read off the first newline: the sizes of the images do not reach the model's forward.
    One host read for all images. Of a very wide image no line of the tiles is left, of a very tall one the newlines only.
    """
    grid = crop_grid(base.config)
    small = grid[0] * grid[1]
    tiled = [f[small:] for f in features if len(f) > small]
    firsts = [(tiles == base.image_newline.to(tiles)).all(-1).to(torch.uint8).argmax() for tiles in tiled]
    widths = iter((torch.stack(firsts) + 1).tolist() if firsts else ())
    grids: list[ImageGrids] = []
    for f in features:
        width = next(widths) if len(f) > small else 0
        grids.append((grid, ((len(f) - small) // width, width)) if width else (grid,))
    return grids


def pooled_frames(base: Any, features: Sequence[Tensor], encoded: Encoded) -> list[ImageGrids]:
    """LLaVA-OneVision's video: every frame at half the side, one newline token at the end."""
    height, width = crop_grid(base.config)
    frame = ((height + 1) // 2, (width + 1) // 2)
    return [(frame,) * (len(f) // tokens_in([frame])) + ((1, 1),) for f in features]


def merged_frames(base: Any, features: Sequence[Tensor], encoded: Encoded) -> list[ImageGrids]:
    """Qwen-VL's image or video: every (double) frame is a grid of merged patches, in the image's own shape.

    Beam search repeats the features of a sample; the tower was told of each image once.
    """
    side = FAMILIES[base.config.model_type].side(base.config)
    grids = [((h // side, w // side),) * t for t, h, w in encoded.thw or []]
    image: dict[int, int] = {}
    for f in features:
        image.setdefault(id(f), len(image))
    return [grids[image[id(f)]] for f in features]


@dataclass(frozen=True)
class Family:
    """One entry of the table.

    Attributes:
        text, vision, projector: where the parts are below the base model.
        towers, decoders: model types of vision tower and decoder that are known to work.
        images, videos: which grids the features of the images and videos are.
        block: setting for the side of the block of patches that the projector turns into one visual token; None = one patch.
        selects: whether the configuration has a strategy for which states of the tower are features.
        tapped: whether each visual token is such a block, so that the tower's attention says something about it.
        packs: whether positions can be packed (not with the three-dimensional positions of Qwen-VL).
        deepstack: whether the first decoder layers add intermediate features of the tower to the full sequence (Qwen3-VL).
    """

    text: str = "language_model"
    vision: str = "vision_tower"
    projector: str = "multi_modal_projector"
    towers: tuple[str, ...] = CLIP_LIKE
    decoders: tuple[str, ...] = LANGUAGE
    images: Adapter = square
    videos: Adapter | None = None
    block: str | None = None
    selects: bool = True
    tapped: bool = True
    packs: bool = True
    deepstack: bool = False

    @property
    def square(self) -> bool:
        """Whether the configuration alone says which grid an image becomes."""
        return self.images is square

    def side(self, config: Any) -> int:
        """Patches along each side of such a block."""
        told = 1 if self.block is None else attrgetter(self.block)(config)
        return (
            told if isinstance(told, int) else round(1 / told)
        )  # InternVL: the share of the side that is left


def idefics(name: str) -> Family:
    """Idefics3 and its small relative: other names, and a connector that folds blocks of patches."""
    return Family(
        text="text_model",
        vision="vision_model",
        projector="connector.modality_projection",
        towers=(f"{name}_vision",),
        block="scale_factor",
        selects=False,
    )


def qwen(name: str, deepstack: bool = False) -> Family:
    """The Qwen-VL line: fused vision projections over packed frames, three-dimensional positions."""
    return Family(
        vision="visual",
        projector="visual.merger",
        towers=(f"{name}_vision",),
        decoders=(f"{name}_text",),
        images=merged_frames,
        videos=merged_frames,
        block="vision_config.spatial_merge_size",
        selects=False,
        tapped=False,
        packs=False,
        deepstack=deepstack,
    )


FAMILIES = {
    "llava": Family(),
    "llava_next": Family(images=anyres, tapped=False),
    "llava_onevision": Family(images=anyres, videos=pooled_frames, tapped=False),
    "internvl": Family(towers=("internvl_vision",), block="downsample_ratio"),
    "idefics3": idefics("idefics3"),
    "smolvlm": idefics("smolvlm"),
    "qwen2_vl": qwen("qwen2_vl"),
    "qwen2_5_vl": qwen("qwen2_5_vl"),
    "qwen3_vl": qwen("qwen3_vl", deepstack=True),
}
"""By ``config.model_type``."""


def token_grid(config: Any, encoded: Encoded | None = None) -> Grid:
    """Height and width of one crop in visual tokens."""
    side = FAMILIES[config.model_type].side(config)
    height, width = crop_grid(config, encoded)
    return height // side, width // side


def crop_grid(config: Any, encoded: Encoded | None = None) -> Grid:
    """Height and width of one crop in patches: the configuration's, or a square of as many as the tower saw (Idefics3)."""
    if encoded is not None and encoded.crops and encoded.crops[0] != tokens_in([crop_grid(config)]):
        return isqrt(encoded.crops[0]), isqrt(encoded.crops[0])
    vision = config.vision_config
    size, patch = ((n, n) if isinstance(n, int) else tuple(n) for n in (vision.image_size, vision.patch_size))
    return size[0] // patch[0], size[1] // patch[1]
