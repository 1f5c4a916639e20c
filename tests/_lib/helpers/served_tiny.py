"""Small random checkpoints of the LLaVA family in a folder, as users save them, for engines that load them from there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.served import CHECKPOINT, QUESTIONS, Asked
from vlmprune.integrations.vllm import ARCHITECTURES

SIDE, PATCH = 32, 8  # 16 patches a crop
IMAGE, VIDEO = "<image>", "<video>"
LAYERS = 3  # of the tower; features are those of the second, and vLLM loads no third

PINPOINTS = {
    "llava_next": [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]],
    "llava_onevision": [[SIDE * down, SIDE * across] for down in range(1, 5) for across in range(1, 5)],
}
"""OneVision's largest are of more than 9 tiles, and so scaled down."""

SIZES = {
    "square": (64, 64),
    "wide": (96, 30),
    "tall": (25, 80),
    "tiny": (5, 7),
    "strip": (400, 9),  # its tiles have no line left
    "pole": (9, 400),
    "large": (300, 290),
}
"""Width and height of pictures, in pixels."""

LAYOUTS = {
    "hub": {"vision_tower.": "vision_tower.vision_model."},
    "4.52": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
}
"""What weights are called that others have saved: on the hub, and by transformers from 4.52 on, before 5."""


def tiny(family: str, folder: Path, tower: str = "clip", decoder: str = "llama", seed: int = 0) -> Path:
    """Save a model and its processor with ``save_pretrained``; returns the folder.

    Args:
        family: "llava", "llava_next" or "llava_onevision".
        folder: where to.
        tower: "clip" or "siglip".
        decoder: "llama", "mistral" or "qwen2".
        seed: of the weights.
    """
    tokenizer = hf.AutoTokenizer.from_pretrained(CHECKPOINT, extra_special_tokens={"video_token": VIDEO})
    kinds: dict[str, Any] = {"image_token_index": tokenizer.convert_tokens_to_ids(IMAGE)}
    if family == "llava_onevision":
        kinds["video_token_index"] = tokenizer.convert_tokens_to_ids(VIDEO)
    if family in PINPOINTS:
        kinds["image_grid_pinpoints"] = PINPOINTS[family]
    config = hf.AutoConfig.for_model(
        family,
        vision_config=_tower(tower),
        text_config=_decoder(decoder),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        **kinds,
    )
    model = hf.AutoModelForImageTextToText.from_config(config)
    draw(model, seed)
    model.save_pretrained(folder)
    _processor(family, tower, tokenizer).save_pretrained(folder)
    return folder


def _tower(name: str) -> Any:
    kind = hf.CLIPVisionConfig if name == "clip" else hf.SiglipVisionConfig
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": LAYERS,
    }
    return kind(image_size=SIDE, patch_size=PATCH, **sizes)


def _decoder(name: str) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 136}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }  # vLLM's on a CPU: 32 at least
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.AutoConfig.for_model(name, **sizes, **heads, **ids, max_position_embeddings=2048)
    if name == "mistral":
        config.sliding_window = None  # as in the checkpoints
    return config


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Weights that pass signals on, so that mistakes show in the tokens; biases and norms as well, so that none is idle."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1 and "embed" not in name:
            weight.copy_(noise * (2 / weight[0].numel() ** 0.5))
        else:
            weight.copy_(noise if weight.ndim > 1 else float("norm" in name) + noise / 4)


def _processor(family: str, tower: str, tokenizer: Any) -> Any:
    size = {"height": SIDE, "width": SIDE}
    told = {"vision_feature_select_strategy": "default" if tower == "clip" else "full"}
    if family == "llava_onevision":
        images = hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS[family])
        videos = hf.LlavaOnevisionVideoProcessor(size=size)
        patches = (SIDE // PATCH) ** 2
        return hf.LlavaOnevisionProcessor(images, tokenizer, videos, num_image_tokens=patches, **told)
    told |= {"patch_size": PATCH, "num_additional_image_tokens": int(tower == "clip")}
    if family == "llava_next":
        shortest = {"shortest_edge": SIDE}
        images = hf.LlavaNextImageProcessor(
            size=shortest, crop_size=size, image_grid_pinpoints=PINPOINTS[family]
        )
        return hf.LlavaNextProcessor(images, tokenizer, **told)
    if tower == "clip":
        images = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    else:
        images = hf.SiglipImageProcessor(size=size)
    return hf.LlavaProcessor(images, tokenizer, **told)


def renamed(folder: Path, to: Path, layout: str) -> Path:
    """The same checkpoint with its weights called as in one of ``LAYOUTS``; returns the new folder."""
    shutil.copytree(folder, to)
    file = to / "model.safetensors"
    weights = {_renamed(name, LAYOUTS[layout]): weight for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    return to


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(old, "") + name.removeprefix(old)


def picture(shape: str, seed: int = 0) -> Image.Image:
    """A picture of coloured blocks, and noise."""
    generator = torch.Generator().manual_seed(seed)
    width, height = SIZES[shape]
    blocks = torch.randint(0, 200, (max(height // 8, 1), max(width // 8, 1), 3), generator=generator)
    large = Image.fromarray(blocks.byte().numpy()).resize((width, height), Image.Resampling.NEAREST)
    noise = torch.randint(0, 56, (height, width, 3), generator=generator).byte()
    return Image.fromarray(np.asarray(large) + noise.numpy())


def ask(*shapes: str, seed: int = 0) -> Asked:
    """A question about pictures of these shapes; none = text alone."""
    images = tuple(picture(shape, seed + i) for i, shape in enumerate(shapes))
    text = QUESTIONS[(seed + len(shapes)) % len(QUESTIONS)]
    return Asked(f"<bos> USER: {f'{IMAGE} ' * len(images)}{text} ASSISTANT:", images)


def engine_settings(family: str) -> Mapping[str, Any]:
    """For ``served.engine``."""
    return {"architecture": ARCHITECTURES[family][0], "max_model_len": 2048}
