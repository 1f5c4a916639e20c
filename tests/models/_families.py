"""Tiny random checkpoints of every family, and prompts for them with images of unequal size; no processors, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import unpad_image

IMAGE, VIDEO, PAD, BOS, EOS, START = 199, 198, 0, 1, 2, 197
LAYERS, STEPS = 6, 4

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "vocab_size": 200,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.25,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
DECODERS = {
    "llama": lambda: hf.LlamaConfig(**TEXT),
    "mistral": lambda: hf.MistralConfig(**TEXT, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**TEXT),
    "qwen3": lambda: hf.Qwen3Config(**TEXT, head_dim=8),
}


def llava(decoder: str = "llama") -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER), text_config=DECODERS[decoder](), image_token_index=IMAGE
    )
    return hf.LlavaForConditionalGeneration(config)


def llava_next() -> Any:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER),
        text_config=DECODERS["mistral"](),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [16, 48]],
    )
    return hf.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> Any:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=DECODERS["qwen2"](),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [48, 48]],
        vision_aspect_ratio="anyres_max_4",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def internvl() -> Any:
    tower = TOWER | {"image_size": [16, 16], "patch_size": [4, 4]}
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**tower, use_qk_norm=True),
        text_config=DECODERS["qwen2"](),
        image_token_id=IMAGE,
    )
    return hf.InternVLForConditionalGeneration(config)


def idefics(name: str) -> Any:
    config = getattr(hf, f"{name}Config")(
        vision_config=getattr(hf, f"{name}VisionConfig")(**TOWER),
        text_config=DECODERS["llama"](),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def qwen(name: str) -> Any:
    tower = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if name == "Qwen2VL":
        tower |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
    if name == "Qwen2_5_VL":
        tower |= {"window_size": 16, "fullatt_block_indexes": [2]}
    if name == "Qwen3VL":
        tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = (
        TEXT | {"rope_parameters": MROPE, "head_dim": 8}
        if name == "Qwen3VL"
        else TEXT | {"rope_parameters": MROPE}
    )
    config = getattr(hf, f"{name}Config")(
        vision_config=tower,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


# What the images of a prompt become: pixels for the model, and how many tokens of which grids each of them is.


@dataclass(frozen=True)
class Picture:
    """One image or video of a prompt: the model's inputs for it, its grids, its placeholder token."""

    inputs: dict[str, Tensor]
    grids: tuple[tuple[int, int], ...]
    token: int = IMAGE

    @property
    def tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.grids)


def crop(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def plain(grid: tuple[int, int]) -> Callable[[torch.Generator, str], Picture]:
    return lambda g, kind: Picture({"pixel_values": crop(g, 1, 3, 16, 16)}, (grid,))


ANYRES = {
    "wide": ((10, 32), 1, 2),
    "tall": ((32, 16), 2, 1),
    "big": ((30, 31), 2, 2),
    "thin": ((32, 6), 2, 1),
}
"""Height and width of an image, and how many tiles down and across it gets."""


def anyres(g: torch.Generator, kind: str) -> Picture:
    size, down, across = ANYRES[kind]
    left = unpad_image(torch.zeros(1, down * 4, across * 4), size).shape[1:]
    inputs = {"pixel_values": crop(g, 1, 1 + down * across, 3, 16, 16), "image_sizes": torch.tensor([size])}
    return Picture(inputs, ((4, 4), (left[0], left[1] + 1)))


def onevision(g: torch.Generator, kind: str) -> Picture:
    if kind == "video":
        return Picture({"pixel_values_videos": crop(g, 1, 3, 3, 16, 16)}, ((2, 2),) * 3 + ((1, 1),), VIDEO)
    if kind == "huge":  # 12 x 12 patches in the tiles, more than four crops: scaled down to 8 x 8
        inputs = {"pixel_values": crop(g, 1, 10, 3, 16, 16), "image_sizes": torch.tensor([(48, 48)])}
        return Picture(inputs, ((4, 4), (8, 9)))
    if kind == "crop":  # one of several images: not cut into tiles
        inputs = {"pixel_values": crop(g, 1, 1, 3, 16, 16), "image_sizes": torch.tensor([(16, 16)])}
        return Picture(inputs, ((4, 4), (1, 1)))
    return anyres(g, kind)


def thw(g: torch.Generator, kind: str) -> Picture:
    t, h, w = {"square": (1, 4, 4), "wide": (1, 4, 8), "tall": (1, 6, 2), "video": (2, 4, 6)}[kind]
    video = kind == "video"
    pixels, grid = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    inputs = {pixels: crop(g, t * h * w, 3 * 2 * 16), grid: torch.tensor([[t, h, w]])}
    return Picture(inputs, ((h // 2, w // 2),) * t, VIDEO if video else IMAGE)


@dataclass(frozen=True)
class Case:
    """One family: its tiny model, its pictures, and what stands in a prompt of one sample and of several.

    ``first`` is its first legal stage; its processor may join pixels ``by_sample``, or say how many images are
    ``counted`` in each.
    """

    make: Callable[[], Any]
    picture: Callable[[torch.Generator, str], Picture]
    one: tuple[int | str, ...]
    padded: tuple[tuple[int | str, ...], ...]
    first: int = 0
    by_sample: bool = False
    counted: bool = False


def fixed(make: Callable[[], Any], grid: tuple[int, int], by_sample: bool = False) -> Case:
    """A family whose images are all alike."""
    padded = (("image", 6, "image", 4), (2, "image", 3), (9,))
    return Case(make, plain(grid), (3, "image", 5), padded, by_sample=by_sample)


def mixed(make: Callable[[], Any], picture: Any, a: str, b: str, c: str, first: int = 0) -> Case:
    """Images of three shapes; one sample has two."""
    return Case(make, picture, (3, a, 5), ((2, a, 4, b, 3), (3, c, 6), (9,)), first)


def qwens(name: str, first: int = 0) -> dict[str, Case]:
    make = lambda: qwen(name)  # noqa: E731
    key = name.lower()
    return {
        key: mixed(make, thw, "wide", "square", "tall", first),
        f"{key}-video": Case(make, thw, (3, "video", 5), (("video", 4), (2, "tall", 2, "video", 3)), first),
    }


CASES = {
    **{f"llava-{name}": fixed(lambda name=name: llava(name), (4, 4)) for name in DECODERS},
    "llava_next": mixed(llava_next, anyres, "wide", "tall", "big"),
    "llava_onevision": Case(
        llava_onevision,
        onevision,
        (3, "thin", 5),
        ((2, "crop", 4, "crop", 3), (3, "huge", 6), (9,)),
        counted=True,
    ),
    "llava_onevision-video": Case(
        llava_onevision, onevision, (3, "video", 5), (("video", 4), (2, "tall", 2, "video", 3))
    ),
    "internvl": fixed(internvl, (2, 2)),
    "idefics3": fixed(lambda: idefics("Idefics3"), (2, 2), by_sample=True),
    "smolvlm": fixed(lambda: idefics("SmolVLM"), (2, 2), by_sample=True),
    **qwens("Qwen2VL"),
    **qwens("Qwen2_5_VL"),
    **qwens("Qwen3VL", first=2),
}


def build(case: Case, seed: int = 0) -> Any:
    """The case's model, with large weights, so that mistakes show in the logits."""
    torch.manual_seed(seed)
    model = case.make().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def prompts(case: Case, samples: Any, seed: int = 0) -> tuple[dict[str, Tensor], list[list[Picture]]]:
    """Left-padded inputs for samples of pictures and ints (that many text tokens), and the pictures of each."""
    g = torch.Generator().manual_seed(seed)
    rows, pictures = [], []
    split = case.first > 0  # Qwen3-VL: text stands between the frames of a video
    for sample in samples:
        ids, seen = [BOS], []
        for part in sample:
            if isinstance(part, int):
                ids += torch.randint(3, 190, (part,), generator=g).tolist()
                continue
            picture = case.picture(g, part)
            seen.append(picture)
            for n, (r, c) in enumerate(picture.grids):
                ids += ([START] if n == 0 or split else []) + [picture.token] * (r * c)
        rows.append(ids)
        pictures.append(seen)
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }
    return inputs | pixels_of(case, pictures, inputs["input_ids"]), pictures


def pixels_of(case: Case, pictures: list[list[Picture]], ids: Tensor) -> dict[str, Tensor]:
    """The pictures' inputs joined the way the family's processor joins them."""
    flat = [p for sample in pictures for p in sample]
    names = dict.fromkeys(name for p in flat for name in p.inputs)
    joined = {name: [p.inputs[name] for p in flat if name in p.inputs] for name in names}
    out = {}
    for name, parts in joined.items():
        if parts[0].ndim == 5:  # tiles: as many for each image
            most = max(x.shape[1] for x in parts)
            parts = [torch.nn.functional.pad(x, (0,) * 6 + (0, most - x.shape[1])) for x in parts]
        out[name] = torch.cat(parts)
    if case.counted:
        out["batch_num_images"] = torch.tensor([len(sample) for sample in pictures])
    if case.by_sample:
        most = max(map(len, pictures))
        per_sample = torch.zeros(len(pictures), most, 3, 16, 16)
        for b, sample in enumerate(pictures):
            for i, picture in enumerate(sample):
                per_sample[b, i] = picture.inputs["pixel_values"][0]
        out["pixel_values"] = per_sample
    if any("grid_thw" in name for name in names):
        out["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return out
