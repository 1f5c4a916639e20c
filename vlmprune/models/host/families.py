"""The model families that can be pruned, and the vision towers and decoders they are made of: one entry each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from vlmprune.models.host.names import ONEVISION, SIZES
from vlmprune.models.host.views import (
    Adapter,
    anyres,
    crop_grid,
    merged_frames,
    pooled_frames,
    square,
)
from vlmprune.policies.base import Grid

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
        fused: the projection of query, key and value, where it is one; they are then rotated. None = there are three.
        scale: the attention's softmax scale.
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
    fused: str | None = None
    scale: str = "scale"
    grids: str | None = None
    padding: str | None = None
    width: str = "hidden_size"
    depth: str = "num_hidden_layers"
    windows: str | None = None
    mergers: str | None = None


QWEN = Tower("blocks", "attn", fused="qkv", scale="scaling", grids="grid_thw", depth="depth")
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


@dataclass(frozen=True)
class Family:
    """One entry of the table.

    Attributes:
        text, vision, projector: where the parts are below the base model.
        towers, decoders: model types of vision tower and decoder that are known to work.
        images, videos: which grids the features of the images and videos are.
        block: setting for the side of the block of patches that the projector turns into one visual token; None = one patch.
        selects: whether the configuration has a strategy for which states of the tower are features.
        tiles: arguments of the base model's ``get_image_features`` that say how images are cut into tiles; () = they are not.
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
    tiles: tuple[str, ...] = ()
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
        packs=False,
        deepstack=deepstack,
    )


FAMILIES = {
    "llava": Family(),
    "llava_next": Family(images=anyres, tiles=(SIZES,)),
    "llava_onevision": Family(images=anyres, videos=pooled_frames, tiles=(SIZES, *ONEVISION)),
    "internvl": Family(towers=("internvl_vision",), block="downsample_ratio"),
    "idefics3": idefics("idefics3"),
    "smolvlm": idefics("smolvlm"),
    "qwen2_vl": qwen("qwen2_vl"),
    "qwen2_5_vl": qwen("qwen2_5_vl"),
    "qwen3_vl": qwen("qwen3_vl", deepstack=True),
}
"""By ``config.model_type``."""


def token_grid(config: Any) -> Grid:
    """Height and width of one crop in visual tokens."""
    side = FAMILIES[config.model_type].side(config)
    height, width = crop_grid(config)
    return height // side, width // side
