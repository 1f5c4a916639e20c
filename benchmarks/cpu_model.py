"""The LLaVA and the prompts of the CPU benchmarks: any size, random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

WORD = 5


@dataclass(frozen=True)
class Size:
    """A model, and policies for it: a budget is counted per image."""

    text: dict[str, int]
    tower: dict[str, int]
    policies: tuple[str, ...]


def size(width: int, layers: int, heads: int, inner: int) -> dict[str, int]:
    """What the configurations of a decoder and of a tower call the same."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }


def make_model(s: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights, drawn on the device."""
    torch.manual_seed(0)
    text, tower = LlamaConfig(**s.text, max_position_embeddings=8192), CLIPVisionConfig(**s.tower)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=s.text["vocab_size"] - 1)
    with device:
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def make_prompt(model: Any, images: int, batch: int = 1) -> dict[str, Tensor]:
    """35 tokens of text, images with one between them, 29 of text; a batch of as many alike."""
    tower, device = model.config.vision_config, model.device
    seen = [model.config.image_token_index] * (tower.image_size // tower.patch_size) ** 2
    ids = torch.tensor([[WORD] * 35 + [*seen, WORD] * images + [WORD] * 29], device=device)
    g = torch.Generator(device).manual_seed(0)
    shape = images, 3, tower.image_size, tower.image_size
    pixels = torch.randn(shape, generator=g, device=device, dtype=model.dtype)
    ids, pixels = ids.repeat(batch, 1), pixels.repeat(batch, 1, 1, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
