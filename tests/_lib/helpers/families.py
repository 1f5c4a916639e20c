"""Tiny random models of every family, and what stands in their prompts; no processors, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from helpers.device import placed
from vlmprune.testing.pictures import ALBUMS, Picture, Samples, make_inputs

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


def llava_config(decoder: str) -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER), text_config=DECODERS[decoder](), image_token_index=IMAGE
    )


def llava_next() -> Any:
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER),
        text_config=DECODERS["mistral"](),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [16, 48]],
    )


def llava_onevision() -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=DECODERS["qwen2"](),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [48, 48]],
        vision_aspect_ratio="anyres_max_4",
    )


def internvl() -> Any:
    tower = TOWER | {"image_size": [16, 16], "patch_size": [4, 4]}
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**tower, use_qk_norm=True),
        text_config=DECODERS["qwen2"](),
        image_token_id=IMAGE,
    )


def idefics(name: str) -> Any:
    return getattr(hf, f"{name}Config")(
        vision_config=getattr(hf, f"{name}VisionConfig")(**TOWER),
        text_config=DECODERS["llama"](),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )


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
    return getattr(hf, f"{name}Config")(
        vision_config=tower,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
    )


@dataclass(frozen=True)
class Case:
    """One family: its tiny configuration, and what stands in a prompt of one sample and in those of several."""

    config: Callable[[], Any]
    one: tuple[int | str, ...] = (3, "wide", 5)
    padded: Samples = (("wide", 6, "wide", 4), (2, "wide", 3), (9,))

    @property
    def by_sample(self) -> bool:
        return ALBUMS[self.config().model_type].by_sample


SHAPES = ((2, "wide", 4, "square", 3), (3, "tall", 6), (9,))
VIDEOS = {"one": (3, "video", 5), "padded": (("video", 4), (2, "tall", 2, "video", 3))}


def qwens(name: str) -> dict[str, Case]:
    make = lambda: qwen(name)  # noqa: E731
    return {name.lower(): Case(make, padded=SHAPES), f"{name.lower()}-video": Case(make, **VIDEOS)}


CASES = {
    **{f"llava-{name}": Case(lambda name=name: llava_config(name)) for name in DECODERS},
    "llava_next": Case(llava_next, padded=SHAPES),
    "llava_onevision": Case(
        llava_onevision, (3, "tall", 5), ((2, "wide", 4, "tall", 3), (3, "huge", 6), (9,))
    ),
    "llava_onevision-video": Case(llava_onevision, **VIDEOS),
    "internvl": Case(internvl),
    "idefics3": Case(lambda: idefics("Idefics3")),
    "smolvlm": Case(lambda: idefics("SmolVLM")),
    **qwens("Qwen2VL"),
    **qwens("Qwen2_5_VL"),
    **qwens("Qwen3VL"),
}


def llava() -> Any:
    return hf.LlavaForConditionalGeneration(llava_config("llama"))


def build(case: Case, seed: int = 0) -> Any:
    """The case's model, with large weights, so that mistakes show in the logits."""
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(case.config()).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return placed(model)


def prompts(case: Case, samples: Samples, seed: int = 0) -> tuple[dict[str, Tensor], list[list[Picture]]]:
    """Left-padded inputs for samples of pictures and ints (that many text tokens), and the pictures of each."""
    return make_inputs(case.config(), samples, seed)
