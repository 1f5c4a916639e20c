"""Prompts with random pictures, made from a model's configuration alone: no processor, no tokenizer, no download.

The shapes are the smallest that the family's own processor could have made and that still differ from one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vlmprune.models import patch_grid
from vlmprune.models.host.families import FAMILIES
from vlmprune.policies.base import Grid, tokens_in

Shape = str | Grid
Samples = Sequence[Sequence[int | Shape]]
"""What stands in each prompt: a number is so many text tokens; "wide", "tall", "square", "huge" and "video" are pictures.

Where ``keeps_shape``, rows and columns of visual tokens are one as well.
"""

RGB, FRAMES = 3, 2
SHAPES = {"wide": (6, 32), "tall": (32, 6), "square": (30, 31), "huge": (48, 48)}
"""Height and width of an image in sixteenths of what the vision tower takes in, where images are cut into tiles."""
PATCHES = {
    "wide": (1, 2, 4),
    "tall": (1, 3, 1),
    "square": (1, 2, 2),
    "huge": (1, 6, 6),
    "video": (FRAMES, 2, 3),
}
"""Frames, rows and columns of merged patches, where pictures keep their shape."""


@dataclass(frozen=True)
class Picture:
    """One image or video of a prompt: the model's inputs for it, and the grids of its visual tokens."""

    inputs: dict[str, Tensor]
    grids: tuple[Grid, ...]
    kind: Literal["image", "video"] = "image"

    @property
    def tokens(self) -> int:
        """How many placeholders stand for it in the prompt."""
        return tokens_in(self.grids)


def samples_of(config: Any) -> dict[str, Samples]:
    """One prompt, and a padded batch: two pictures, one (a video where the family knows them), none."""
    other = "tall" if FAMILIES[config.model_type].videos is None else "video"
    return {"prompt": ((3, "wide", 5),), "batch": ((2, "wide", 4, "tall", 3), (3, other, 6), (9,))}


def make_inputs(
    config: Any, samples: Samples, seed: int = 0
) -> tuple[dict[str, Tensor], list[list[Picture]]]:
    """The model's inputs on the CPU, padded on the left, and the pictures of each sample.

    Args:
        config: of a family in ``vlmprune.models.host.families.FAMILIES``.
        samples: what stands in each prompt, behind one token of text.
        seed: of token ids and pixels; pixels are uniform in [-1, 1), float32.
    """
    g, album = torch.Generator().manual_seed(seed), ALBUMS[config.model_type]
    words = _words(config)
    prompts: list[list[int]] = []
    pictures: list[list[Picture]] = []
    for sample in samples:
        ids, seen = _draw_words(words, 1, g), []
        images = sum(not isinstance(part, int) and part != "video" for part in sample)
        for part in sample:
            if isinstance(part, int):
                ids += _draw_words(words, part, g)
                continue
            picture = album.draw(config, g, part, images == 1)
            ids += album.placeholders(config, picture)
            seen.append(picture)
        prompts.append(ids)
        pictures.append(seen)
    width = max(map(len, prompts))
    inputs = {
        "input_ids": torch.tensor([[int(words[0])] * (width - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }
    return inputs | album.join(config, inputs["input_ids"], pictures), pictures


def _words(config: Any) -> Tensor:
    """The token ids that are no placeholder and start no picture. The first three usually begin, end and fill prompts."""
    special = [config.image_token_id]
    if FAMILIES[config.model_type].videos is not None:
        special.append(config.video_token_id)
    if ALBUMS[config.model_type].starts is not None:
        special.append(config.vision_start_token_id)
    ids = torch.arange(3, config.text_config.vocab_size)
    return ids[~torch.isin(ids, torch.tensor(special))]


def _draw_words(words: Tensor, count: int, g: torch.Generator) -> list[int]:
    return words[torch.randint(len(words), (count,), generator=g)].tolist()


def _pixels(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g) * 2 - 1


def _fixed(config: Any, g: torch.Generator, shape: Shape, alone: bool) -> Picture:
    """Every image is one crop of the size that the tower takes in."""
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return Picture({"pixel_values": _pixels(g, 1, RGB, height, width)}, (patch_grid(config),))


def _tiled(config: Any, g: torch.Generator, shape: Shape, alone: bool) -> Picture:
    """LLaVA-NeXT: the whole image in small, and its tiles without their padding, a newline after every row."""
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    size = [side * n // 16 for n in SHAPES[str(shape)]]
    down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
    tiles = torch.empty(1, down * patches, across * patches, device="meta")
    rows, columns = unpad_image(tiles, size).shape[1:]
    pixels = _pixels(g, 1, 1 + down * across, RGB, side, side)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([size])}
    return Picture(inputs, ((patches, patches), (rows, columns + 1)))


def _onevision(config: Any, g: torch.Generator, shape: Shape, alone: bool) -> Picture:
    """LLaVA-OneVision: tiles of a single image, scaled down if many; of several images only the small views; frames."""
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    if shape == "video":
        pooled = (patches + 1) // 2
        inputs = {"pixel_values_videos": _pixels(g, 1, FRAMES, RGB, side, side)}
        return Picture(inputs, ((pooled, pooled),) * FRAMES + ((1, 1),), "video")
    if not alone:
        inputs = {"pixel_values": _pixels(g, 1, 1, RGB, side, side)}
        return Picture(inputs | {"image_sizes": torch.tensor([(side, side)])}, ((patches, patches), (1, 1)))
    picture = _tiled(config, g, shape, alone)
    rows, columns = picture.grids[1][0], picture.grids[1][1] - 1
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = sqrt(rows * columns / (most * patches**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return Picture(picture.inputs, (picture.grids[0], (rows, columns + 1)))


def _packed(config: Any, g: torch.Generator, shape: Shape, alone: bool) -> Picture:
    """Qwen-VL: patches of all pictures in one row, each in its own shape."""
    vision = config.vision_config
    t, rows, columns = PATCHES[shape] if isinstance(shape, str) else (1, *shape)
    h, w = rows * vision.spatial_merge_size, columns * vision.spatial_merge_size
    pixels = _pixels(g, t * h * w, RGB * vision.temporal_patch_size * vision.patch_size**2)
    thw, grids = torch.tensor([[t, h, w]]), ((rows, columns),) * t
    if shape == "video":
        return Picture({"pixel_values_videos": pixels, "video_grid_thw": thw}, grids, "video")
    return Picture({"pixel_values": pixels, "image_grid_thw": thw}, grids)


@dataclass(frozen=True)
class Album:
    """How one family's pictures come to the model.

    Attributes:
        draw: ``(config, generator, shape, whether it is its sample's only image)`` to a picture.
        by_sample: whether its processor gives the pixels a dimension for the sample, instead of all images in a row.
        counted: whether it also says how many images each sample has.
        starts: whether a start token stands before each picture, or before each of its frames; None = there is none.
    """

    draw: Callable[[Any, torch.Generator, Shape, bool], Picture]
    by_sample: bool = False
    counted: bool = False
    starts: Literal["picture", "frame"] | None = None

    def placeholders(self, config: Any, picture: Picture) -> list[int]:
        """The token ids that stand for a picture."""
        token = config.image_token_id if picture.kind == "image" else config.video_token_id
        if self.starts is None:
            return [token] * picture.tokens
        frames = picture.grids if self.starts == "frame" else [(1, picture.tokens)]
        return [i for r, c in frames for i in [config.vision_start_token_id, *[token] * (r * c)]]

    def join(self, config: Any, ids: Tensor, pictures: list[list[Picture]]) -> dict[str, Tensor]:
        """The inputs of all pictures together."""
        flat = [picture for sample in pictures for picture in sample]
        names = dict.fromkeys(name for picture in flat for name in picture.inputs)
        out = {name: _cat([p.inputs[name] for p in flat if name in p.inputs]) for name in names}
        if self.by_sample and flat:
            counts = list(map(len, pictures))
            rows = torch.split(out["pixel_values"], counts)
            out["pixel_values"] = torch.stack([_fill(row, 0, max(counts)) for row in rows])
        if self.counted and "pixel_values" in out:
            images = [sum(p.kind == "image" for p in sample) for sample in pictures]
            out["batch_num_images"] = torch.tensor(images)
        if self.starts is not None and flat:
            kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
            out["mm_token_type_ids"] = kinds
        return out


def _cat(parts: list[Tensor]) -> Tensor:
    """Joined along the first dimension; where images have tiles, each gets as many as the one with the most."""
    if parts[0].ndim == 5:
        most = max(part.shape[1] for part in parts)
        parts = [_fill(part, 1, most) for part in parts]
    return torch.cat(parts)


def _fill(x: Tensor, dim: int, length: int) -> Tensor:
    """Zeros behind ``x`` along one dimension."""
    return pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, length - x.shape[dim]))


ALBUMS = {
    "llava": Album(_fixed),
    "llava_next": Album(_tiled),
    "llava_onevision": Album(_onevision, counted=True),
    "internvl": Album(_fixed),
    "idefics3": Album(_fixed, by_sample=True),
    "smolvlm": Album(_fixed, by_sample=True),
    "qwen2_vl": Album(_packed, starts="picture"),
    "qwen2_5_vl": Album(_packed, starts="picture"),
    "qwen3_vl": Album(_packed, starts="frame"),
}
"""By ``config.model_type``, one for each of ``FAMILIES``."""


def keeps_shape(config: Any) -> bool:
    """Whether pictures keep their shape, so that an image of any number of visual tokens can be made."""
    return ALBUMS[config.model_type].draw is _packed
